// The choice of element type for the kernels of rowwise.h; the including file defines ISA.
#pragma once

#include "cpu/activation_kernels.h"
#include "cpu/norm_kernels.h"
#include "cpu/rope_kernels.h"

namespace llava_fast {
namespace ISA {

template <typename Task, typename F, typename H, typename B>
static void by_type(const Task& task, F f32, H f16, B bf16) {
    (task.dtype == DType::f32 ? f32 : task.dtype == DType::f16 ? f16 : bf16)(task);
}

template <Activation kKind>
static void activation_forward_of(const ActivationTask& task) {
    by_type(task, activation_forward<float, kKind>, activation_forward<f16, kKind>, activation_forward<bf16, kKind>);
}

template <Activation kKind>
static void activation_backward_of(const ActivationTask& task) {
    by_type(task, activation_backward<float, kKind>, activation_backward<f16, kKind>, activation_backward<bf16, kKind>);
}

}  // namespace ISA

void LLAVA_FAST_JOIN(norm_forward_, ISA)(const NormTask& task) {
    ISA::by_type(task, ISA::norm_forward<float>, ISA::norm_forward<f16>, ISA::norm_forward<bf16>);
}

void LLAVA_FAST_JOIN(norm_backward_, ISA)(const NormTask& task) {
    ISA::by_type(task, ISA::norm_backward<float>, ISA::norm_backward<f16>, ISA::norm_backward<bf16>);
}

void LLAVA_FAST_JOIN(rope_, ISA)(const RopeTask& task) {
    ISA::by_type(task, ISA::rope<float>, ISA::rope<f16>, ISA::rope<bf16>);
}

void LLAVA_FAST_JOIN(activation_forward_, ISA)(const ActivationTask& task) {
    switch (task.kind) {
        case Activation::gelu:
            return ISA::activation_forward_of<Activation::gelu>(task);
        case Activation::gelu_pytorch_tanh:
            return ISA::activation_forward_of<Activation::gelu_pytorch_tanh>(task);
        case Activation::quick_gelu:
            return ISA::activation_forward_of<Activation::quick_gelu>(task);
        case Activation::silu:
            return ISA::activation_forward_of<Activation::silu>(task);
    }
}

void LLAVA_FAST_JOIN(activation_backward_, ISA)(const ActivationTask& task) {
    switch (task.kind) {
        case Activation::gelu:
            return ISA::activation_backward_of<Activation::gelu>(task);
        case Activation::gelu_pytorch_tanh:
            return ISA::activation_backward_of<Activation::gelu_pytorch_tanh>(task);
        case Activation::quick_gelu:
            return ISA::activation_backward_of<Activation::quick_gelu>(task);
        case Activation::silu:
            return ISA::activation_backward_of<Activation::silu>(task);
    }
}

void LLAVA_FAST_JOIN(swiglu_forward_, ISA)(const SwigluTask& task) {
    ISA::by_type(task, ISA::swiglu_forward<float>, ISA::swiglu_forward<f16>, ISA::swiglu_forward<bf16>);
}

void LLAVA_FAST_JOIN(swiglu_backward_, ISA)(const SwigluTask& task) {
    ISA::by_type(task, ISA::swiglu_backward<float>, ISA::swiglu_backward<f16>, ISA::swiglu_backward<bf16>);
}

}  // namespace llava_fast
