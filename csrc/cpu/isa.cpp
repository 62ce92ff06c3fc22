#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace llava_fast {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

bool machine_has(Isa isa) {
#if defined(__x86_64__)
    // These builtins also ask the operating system whether it saves the wide registers.
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx2) return avx2;
    if (isa == Isa::avx512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
    }
#endif
    return isa == Isa::portable;
}

Isa parse(const std::string& name) {
    for (int level = 0; level < 3; ++level) {
        if (name == kNames[level] && machine_has(static_cast<Isa>(level))) return static_cast<Isa>(level);
    }
    std::string known;
    for (const std::string& supported : supported_isas()) known += (known.empty() ? "" : ", ") + supported;
    throw std::invalid_argument("LLAVA_FAST_ISA must be one of " + known + " on this machine, got '" + name + "'");
}

Isa initial() {
    const char* asked = std::getenv("LLAVA_FAST_ISA");
    return parse(asked != nullptr && *asked != '\0' ? asked : supported_isas().back());
}

std::atomic<Isa>& selected() {
    static std::atomic<Isa> isa{initial()};
    return isa;
}

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (int level = 0; level < 3; ++level) {
        if (machine_has(static_cast<Isa>(level))) names.emplace_back(kNames[level]);
    }
    return names;
}

Isa current_isa() {
    return selected().load(std::memory_order_relaxed);
}

std::string isa_name(Isa isa) {
    return kNames[static_cast<int>(isa)];
}

void set_isa(const std::string& name) {
    selected().store(parse(name), std::memory_order_relaxed);
}

}  // namespace llava_fast
