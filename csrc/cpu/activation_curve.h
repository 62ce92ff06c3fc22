// The tables by which bf16 activations are computed where a register holds half of one: rowwise.h has the form.
#pragma once

#include "cpu/rowwise.h"

namespace llava_fast {

// f(x) / x of the activation, or f'(x): within 3e-6 everywhere. Made at the first call.
const Curve& activation_curve(Activation kind, bool slope);

}  // namespace llava_fast
