#include "cpu/linear_gradient.h"

#include <stdexcept>

#include "cpu/isa.h"

namespace llava_fast {

void product(const ProductTask& task) {
    if (task.b_type != DType::f32 && task.b_type != DType::bf16) throw std::invalid_argument("b must be fp32 or bf16");
#if LLAVA_FAST_LEVEL >= 3
    if (current_isa() == Isa::amx) {
        if (task.M > 0 && task.N > 0) product_amx(task);
        return;
    }
#endif
    throw std::invalid_argument("products of gradients are for amx, got " + isa_name(current_isa()));
}

}  // namespace llava_fast
