// Which instruction set the CPU kernels run on: the best one the machine has, or the one LLAVA_FAST_ISA names.
#pragma once

#include <string>
#include <vector>

namespace llava_fast {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// Names the machine can run, best last.
std::vector<std::string> supported_isas();

// The one in use. The first call reads LLAVA_FAST_ISA and throws std::invalid_argument where the machine lacks it.
Isa current_isa();

std::string isa_name(Isa isa);

// Switch for the whole process; throws std::invalid_argument for a name that is unknown or that the machine lacks.
void set_isa(const std::string& name);

}  // namespace llava_fast
