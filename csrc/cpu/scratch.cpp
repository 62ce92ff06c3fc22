#include "cpu/scratch.h"

#include <new>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace llava_fast {

namespace {

constexpr std::align_val_t kAlign{64};

// Each thread that calls ops keeps its last block of up to 128 MiB and no more: fresh pages cost 0.25 to 8 us for 4 KB, so a call that
// maps its memory anew is the slower for it. What is larger (the backward pass of attention over long sequences) is freed with the call.
constexpr int64_t kKept = (int64_t{128} << 20) / sizeof(float);

struct Block {
    float* data = nullptr;
    int64_t size = 0;
    ~Block() { ::operator delete(data, kAlign); }
};

thread_local Block kept;

}  // namespace

Scratch::Scratch(int64_t threads, int64_t floats) : slice_((floats + 15) / 16 * 16) {
    const int64_t need = threads * slice_;
    if (need <= kKept) {
        std::swap(data_, kept.data);
        std::swap(size_, kept.size);
        if (need <= size_) return;
        ::operator delete(std::exchange(data_, nullptr), kAlign);
    }
    data_ = static_cast<float*>(::operator new(need * sizeof(float), kAlign));
    size_ = need;
}

Scratch::~Scratch() {
    if (size_ <= kKept) {
        std::swap(data_, kept.data);
        std::swap(size_, kept.size);
    }
    ::operator delete(data_, kAlign);
}

float* Scratch::of(int64_t thread) const {
    return data_ + thread * slice_;
}

float* Scratch::mine() const {
#if defined(_OPENMP)
    return of(omp_get_thread_num());
#else
    return of(0);
#endif
}

}  // namespace llava_fast
