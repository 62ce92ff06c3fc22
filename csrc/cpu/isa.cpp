#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if LLAVA_FAST_LEVEL > 0
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace llava_fast {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};
constexpr int kLevels = 4;

#if LLAVA_FAST_LEVEL > 0
// The registers of AMX are 8 KB more for the kernel to save, so a process asks for them, once for all its threads. It cannot give them
// back: nobody asks who named another instruction set.
bool amx_granted() {
#if defined(__linux__)
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and the number of that state
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBf16) != 0 && (edx & kTile) != 0 &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

bool has_f16c() {  // older compilers' builtin does not know its name
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & 1u << 29) != 0;
}

bool machine_has(Isa isa) {
    if (isa == Isa::portable) return true;
    if (static_cast<int>(isa) > LLAVA_FAST_LEVEL) return false;
    // These builtins also ask the operating system whether it saves the wide registers.
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return false;
    if (isa == Isa::avx2) return true;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq")) {
        return false;
    }
    if (isa == Isa::avx512) return true;
    static const bool amx = amx_granted();
    return amx;
}
#else
bool machine_has(Isa isa) {
    return isa == Isa::portable;
}
#endif

Isa parse(const std::string& name) {
    for (int level = 0; level < kLevels; ++level) {
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
    for (int level = 0; level < kLevels; ++level) {
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
