// Stands in front of torch's own torch/extension.h, which costs each file of this recipe most of its compile.
// Everything here comes from torch's installed headers; nothing is declared anew but the few names that
// torch/types.h would give. Kernel files (nvcc) get tensors, bindings get torch's pybind11 casters.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#ifdef __CUDACC__
#include <ATen/ops/empty_ops.h>
#else
#include <torch/csrc/utils/pybind.h>
#endif

namespace torch {
using namespace at;

#ifdef __CUDACC__
constexpr auto kInt8 = at::kChar;
constexpr auto kInt32 = at::kInt;
constexpr auto kFloat16 = at::kHalf;
constexpr auto kFloat32 = at::kFloat;

// at::empty as ATen/ops/empty.h defines it, without that file's 6 s of includes.
inline at::Tensor empty(at::IntArrayRef size, const at::TensorOptions& options = {}) {
  return at::_ops::empty_memory_format::call(
      c10::fromIntArrayRefSlow(size), c10::optTypeMetaToScalarType(options.dtype_opt()), options.layout_opt(),
      options.device_opt(), options.pinned_memory_opt(), std::nullopt);
}
#endif
} // namespace torch

#ifndef __CUDACC__
namespace py = pybind11;
#endif
