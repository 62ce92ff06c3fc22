// Names of the element types that cross the border from Python.
#pragma once

namespace llava_fast {

enum class DType : int { f32, f64, bf16, f16, e4m3 };

}  // namespace llava_fast
