// Working memory of a call, a slice for each thread, made before its threads start: an exception that leaves an OpenMP region ends the
// process, where one that is thrown here becomes a MemoryError.
#pragma once

#include <cstdint>

namespace llava_fast {

// Members are not inline: files of several instruction sets include this, and the linker may keep any of their copies.
class Scratch {
  public:
    Scratch(int64_t threads, int64_t floats);  // floats: of a slice, which begins at a multiple of 64 bytes. Throws std::bad_alloc.
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* of(int64_t thread) const;
    float* mine() const;  // of the OpenMP thread that asks

  private:
    float* data_ = nullptr;
    int64_t size_ = 0, slice_;
};

}  // namespace llava_fast
