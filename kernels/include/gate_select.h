#pragma once
#include "select.h"
namespace moe {
struct GateSelectParams {
  const void* x;       // (T, D)
  const void* weight;  // (E, D)
  void* logits;        // (T, E)
  int64_t d_model;
  SelectParams select;
};
namespace cuda { Status gate_select(const GateSelectParams& params, Stream stream); }
}
