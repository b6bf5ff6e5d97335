#include "common.cuh"
#include "ffn_sm80_launch.cuh"


// As in the dispatcher: nothing to do without rows.
template <class P, Status (*f)(const P&, Stream)>
Status guarded(const P& p, Stream s) { return p.shape.rows == 0 ? Status{} : f(p, s); }

template <class V>
Functions guarded_all(const char* name) {
  return {name, guarded<FfnUpParams, sm80::up<V>>, guarded<FfnDownParams, sm80::down<V>>, guarded<FfnDownBackwardParams, sm80::down_backward<V>>,
          guarded<FfnUpBackwardParams, sm80::up_backward<V>>, sm80::weight_backward<V>};
}

const std::vector<Functions>& variants() {
  static const std::vector<Functions> v = {
      {"chosen", moe::cuda::ffn_up, moe::cuda::ffn_down, moe::cuda::ffn_down_backward, moe::cuda::ffn_up_backward, moe::cuda::ffn_weight_backward},
#ifndef NO_VARIANTS
      guarded_all<sm80::Variant<2, 4, 2>>("n128"),
#endif
  };
  return v;
}
