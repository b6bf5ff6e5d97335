// The expert feed-forward network of a Mixture-of-Experts layer, down(act(up(x))), forward and backward.
// Shapes: N rows sorted by expert, E experts, D d_model, F hidden, G = 2F for SwiGLU (gate, then up), F for GELU,
// T tokens, K = top_k. Weights: up (E, G, D), down (E, D, F). Rows, weights and gradients have one 16 bit dtype, but for
// weight gradients in fp32; sums are fp32. Expert e owns the rows [expert_offsets[e], expert_offsets[e + 1]); rows from expert_offsets[E] on belong to
// dropped slots: nothing there is read or written. D and F are multiples of 8, and pointers aligned to 16 bytes.
#pragma once

#include "select.h"
#include "status.h"

namespace moe {

enum class Activation : int { kSwiglu = 0, kGelu = 1 };

struct FfnShape {
  int64_t num_rows;    // N
  int64_t d_model;     // D
  int64_t hidden_dim;  // F
  int experts;         // E
  Activation activation;
  DType dtype;
  int sm_margin;       // multiprocessors left to kernels of other streams
};

// The combine weight of row r is weights[slot_of_row[r]], with the (T, K) weights flat.
struct RowWeights {
  const float* weights;        // or null: all are one
  const int32_t* slot_of_row;  // perm_N
};

struct FfnUpParams {  // hidden = rows up^T, h = weight * act(hidden)
  const void* rows;   // (N, D)
  const void* up;     // (E, G, D)
  const int32_t* expert_offsets;
  RowWeights combine;
  void* hidden;       // (N, G), or null: not kept
  void* h;            // (N, F)
  FfnShape shape;
};

struct FfnDownParams {  // out = h down^T
  const void* h;        // (N, F)
  const void* down;     // (E, D, F)
  const int32_t* expert_offsets;
  void* out;            // (N, D)
  FfnShape shape;
};

struct FfnDownBackwardParams {  // of h, through the weight and the activation
  const void* grad_out;         // (N, D)
  const void* down;             // (E, D, F)
  const void* hidden;           // (N, G)
  const int32_t* expert_offsets;
  RowWeights combine;
  void* grad_hidden;            // (N, G); may be hidden itself
  void* h;                      // (N, F), recomputed for the gradient of down
  float* grad_weights;          // (T, K), 0 for dropped slots; null where combine.weights is
  float* workspace;             // ffn_workspace(N, F) floats; null where grad_weights is
  FfnShape shape;
};

struct FfnUpBackwardParams {  // grad_rows = grad_hidden up
  const void* grad_hidden;    // (N, G)
  const void* up;             // (E, G, D)
  const int32_t* expert_offsets;
  void* grad_rows;            // (N, D)
  FfnShape shape;
};

// grad_weight[e] = sum over the rows r of expert e of grad[r]^T input[r]; 0 for an expert without rows. In fp32 it may be
// added to what is there.
struct FfnWeightParams {
  const void* grad;   // (N, O)
  const void* input;  // (N, I)
  const int32_t* expert_offsets;
  void* grad_weight;  // (E, O, I)
  bool fp32;          // grad_weight is; else it has the dtype of the rows
  bool accumulate;    // only in fp32
  int64_t num_rows, outputs, inputs;  // N, O, I
  int experts;
  DType dtype;
  int sm_margin;
};

inline int64_t ffn_width(const FfnShape& s) {
  return s.activation == Activation::kSwiglu ? 2 * s.hidden_dim : s.hidden_dim;
}

namespace cuda {
int64_t ffn_workspace(int64_t num_rows, int64_t hidden_dim);  // floats
Status ffn_up(const FfnUpParams& params, Stream stream);
Status ffn_down(const FfnDownParams& params, Stream stream);
Status ffn_down_backward(const FfnDownBackwardParams& params, Stream stream);
Status ffn_up_backward(const FfnUpBackwardParams& params, Stream stream);
Status ffn_weight_backward(const FfnWeightParams& params, Stream stream);
}  // namespace cuda

}  // namespace moe
