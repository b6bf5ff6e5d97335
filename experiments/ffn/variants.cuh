#pragma once
#include "common.cuh"
#include "ffn_sm90_down_backward.cuh"

// Down backward's stages and slots. Variants of four stages or three warpgroups let hidden come through the stages.
template <class V>
struct InPlaceOf : V {
  static constexpr int kStages = 3, kSlots = 5, kLead = V::kLead < 3 ? V::kLead : 3;
};

// Loads and stores without products, to tell what holds a kernel back. Its results are garbage.
struct DryBf16 : Bf16 {};
namespace moe::cuda {
template <Major kMajorA, Major kMajorB, int kColumns>
struct WgmmaOf<DryBf16, kMajorA, kMajorB, kColumns> {
  template <class... Args> static __device__ __forceinline__ void fma(Args&&...) {}
};
}  // namespace moe::cuda

template <class V, bool kNarrow, class First = Bf16>
struct Of {
  template <class Run> static Status with(DType d, Activation a, const Run& run) {
    if (d == DType::kBf16 && a == Activation::kSwiglu) return run(First{}, Swiglu{});
    if constexpr (!kNarrow) {
      if (d == DType::kBf16) return run(Bf16{}, Gelu{});
      if (d == DType::kFp16) return a == Activation::kSwiglu ? run(Fp16{}, Swiglu{}) : run(Fp16{}, Gelu{});
    }
    return {Code::kDtype16};
  }
  template <class Run> static Status with(DType d, const Run& run) {
    if (d == DType::kBf16) return run(First{});
    if constexpr (!kNarrow) {
      if (d == DType::kFp16) return run(Fp16{});
    }
    return {Code::kDtype16};
  }
  static Status up(const FfnUpParams& p, Stream s) {
    return with(p.shape.dtype, p.shape.activation, [&](auto f, auto a) { return sm90::up<decltype(f), decltype(a), V>(p, s); });
  }
  static Status down(const FfnDownParams& p, Stream s) {
    const sm90::RowProduct q{p.h, p.down, p.expert_offsets, p.out, p.shape.rows, p.shape.d_model, p.shape.hidden, p.shape.experts, p.shape.dtype};
    return with(p.shape.dtype, [&](auto f) { return sm90::rows_by_weights<decltype(f), Major::K, V>(q, s); });
  }
  static Status down_backward(const FfnDownBackwardParams& p, Stream s) {
    return with(p.shape.dtype, p.shape.activation, [&](auto f, auto a) {
      return sm90::down_backward<decltype(f), decltype(a), InPlaceOf<V>>(p, s);
    });
  }
  static Status up_backward(const FfnUpBackwardParams& p, Stream s) {
    const sm90::RowProduct q{p.grad_hidden, p.up, p.expert_offsets, p.grad_rows, p.shape.rows, p.shape.d_model, ffn_width(p.shape), p.shape.experts, p.shape.dtype};
    return with(p.shape.dtype, [&](auto f) { return sm90::rows_by_weights<decltype(f), Major::MN, V>(q, s); });
  }
  static Status weight(const FfnWeightParams& p, Stream s) {
    return with(p.dtype, [&](auto f) { return sm90::weight_gradient<decltype(f), std::conditional_t<V::kAlongN, sm90::Variant<1, 3, 4>, V>>(p, s); });
  }
  static Functions all(const char* name) {
    Functions f{name, up, down, nullptr, up_backward, weight, nullptr, kNarrow, !std::is_same_v<First, Bf16>};
    if constexpr (V::kGroups == 2) f.down_backward = down_backward;
    return f;
  }
};
