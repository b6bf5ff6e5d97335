#include "counts.h"

#include "cuda_backend.h"
#include "row_counts.h"

namespace moe::bindings {
namespace {

template <class Params>
void count(Status (*launcher)(const Params&, Stream), const Params& params, int device, uintptr_t stream,
           const char* name) {
  const Share& s = params.share;
  run<Cuda>(launcher, params, device, stream, name, std::pair("rank", s.rank), std::pair("ranks", s.ranks),
            std::pair("chunks", s.chunks), std::pair("local_experts", s.local_experts), std::pair("groups", s.groups));
}

void bin_slots(uintptr_t expert_ids, uintptr_t bins, int64_t slots, int64_t chunk_slots, int rank, int ranks,
               int chunks, int local_experts, int groups, int device, uintptr_t stream) {
  const BinParams params{pointer<int32_t>(expert_ids), pointer<int32_t>(bins), slots, chunk_slots,
                         {rank, ranks, chunks, local_experts, groups}};
  count(cuda::bin_slots, params, device, stream, "bin_slots");
}

void count_leaving(uintptr_t bin_offsets, uintptr_t leaving, int rank, int ranks, int chunks, int local_experts,
                   int groups, int device, uintptr_t stream) {
  const LeavingParams params{pointer<int32_t>(bin_offsets), pointer<int32_t>(leaving),
                             {rank, ranks, chunks, local_experts, groups}};
  count(cuda::count_leaving, params, device, stream, "count_leaving");
}

void count_arriving(uintptr_t leaving, uintptr_t arriving, uintptr_t totals, uintptr_t offsets, int rank, int ranks,
                    int chunks, int local_experts, int groups, int device, uintptr_t stream) {
  const ArrivingParams params{pointer<int32_t>(leaving), pointer<int32_t>(arriving), pointer<int32_t>(totals),
                              pointer<int32_t>(offsets), {rank, ranks, chunks, local_experts, groups}};
  count(cuda::count_arriving, params, device, stream, "count_arriving");
}

void row_places(uintptr_t arriving, uintptr_t places, int rank, int ranks, int chunks, int local_experts,
                int groups, int device, uintptr_t stream) {
  const PlacesParams params{pointer<int32_t>(arriving), pointer<int32_t>(places),
                            {rank, ranks, chunks, local_experts, groups}};
  count(cuda::row_places, params, device, stream, "row_places");
}

}  // namespace

void bind_counts(py::module_& m) {
  m.def("bin_slots", &bin_slots,
        "(expert_ids, bins, slots, chunk_slots, rank, ranks, chunks, local_experts, groups, device, stream)");
  m.def("count_leaving", &count_leaving,
        "(bin_offsets, leaving, rank, ranks, chunks, local_experts, groups, device, stream)");
  m.def("count_arriving", &count_arriving,
        "(leaving, arriving, totals, offsets, rank, ranks, chunks, local_experts, groups, device, stream)");
  m.def("row_places", &row_places,
        "(arriving, places, rank, ranks, chunks, local_experts, groups, device, stream)");
}

}  // namespace moe::bindings
