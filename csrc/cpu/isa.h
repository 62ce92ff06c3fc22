// Which instruction set the CPU kernels run on: the best one the machine has, or the one LLAVA_FAST_ISA names.
#pragma once

#include <string>
#include <vector>

namespace llava_fast {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };  // amx: only where an op has a path of its own

// Names the machine can run, best last.
std::vector<std::string> supported_isas();

// The one in use. The first call reads LLAVA_FAST_ISA and throws std::invalid_argument where the machine lacks it.
Isa current_isa();

std::string isa_name(Isa isa);

// Switch for the whole process; throws std::invalid_argument for a name that is unknown or that the machine lacks.
void set_isa(const std::string& name);

template <typename F>
F choose(F portable, F avx2, F avx512) {
    return current_isa() >= Isa::avx512 ? avx512 : current_isa() == Isa::avx2 ? avx2 : portable;
}

}  // namespace llava_fast

// The function among name_portable, name_avx2 and name_avx512 for the instruction set in use. LLAVA_FAST_LEVEL: the best one whose files
// were compiled, as a number of Isa (setup.py).
#if LLAVA_FAST_LEVEL >= 2
#define LLAVA_FAST_CHOOSE(name) choose(name##_portable, name##_avx2, name##_avx512)
#elif LLAVA_FAST_LEVEL == 1
#define LLAVA_FAST_CHOOSE(name) choose(name##_portable, name##_avx2, name##_avx2)
#else
#define LLAVA_FAST_CHOOSE(name) name##_portable
#endif
