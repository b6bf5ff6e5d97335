// Tiles of random groups, for clusters along M and N: each must come once, in clusters that share what they load.
#include <map>
#include "product.h"
using namespace moe; using namespace moe::cuda;

template <int kCluster_, int kGroups, bool kAlongN_, bool kContractsRows_>
struct Fake {
  static constexpr int kCluster = kCluster_, kTileM = kGroups * 64;
  static constexpr bool kAlongN = kAlongN_, kContractsRows = kContractsRows_;
  static int rank() { return blockIdx.x % kCluster; }
};

template <class Kind> void test(std::mt19937& rng) {
  const int experts = 1 + rng() % 80, n_tiles = 1 + rng() % 3, m_tiles = Kind::kContractsRows ? 1 + rng() % 9 : 0, clusters = 1 + rng() % 5;
  std::vector<int> off(experts + 1, 0);
  const int most = rng() % 2 ? 30 : 500;
  for (int e = 0; e < experts; ++e) off[e + 1] = off[e] + (rng() % 3 ? rng() % most : 0);
  const int rows = rng() % 4 ? off[experts] + rng() % 3 : off[experts] / 2;  // offsets beyond are cut
  const ffn::Tiling tiling{off.data(), experts, rows, m_tiles, n_tiles};
  std::vector<std::vector<ffn::Tile>> of(clusters * Kind::kCluster);
  emu_run(clusters * Kind::kCluster, 32, [&] {
    ffn::Tiles<Kind> tiles(tiling);
    const int block = blockIdx.x;
    for (ffn::Tile t; tiles.next(t);) if (threadIdx.x == 0) of[block].push_back(t);
  });
  const auto fail = [&](const char* why) { printf("FAIL %s: cluster %d tile %d along n %d contracts %d experts %d\n", why, Kind::kCluster, Kind::kTileM, Kind::kAlongN, Kind::kContractsRows, experts); exit(1); };
  std::map<std::array<int, 3>, int> seen;  // expert, top, n
  for (int c = 0; c < clusters; ++c) for (int r = 0; r < Kind::kCluster; ++r) {
    const auto &mine = of[c * Kind::kCluster + r], &first = of[c * Kind::kCluster];
    if (mine.size() != first.size()) fail("sizes");
    for (size_t i = 0; i < mine.size(); ++i) {
      const ffn::Tile &t = mine[i], &f = first[i];
      if (t.expert != f.expert || (Kind::kAlongN ? t.top != f.top || t.n != f.n + r : t.n != f.n || t.top != f.top + r * Kind::kTileM)) fail("neighbours");
      const int begin = std::min(off[t.expert], rows), count = std::min(off[t.expert + 1], rows) - begin;
      if (Kind::kContractsRows ? t.row != begin || t.rows != count : t.row != begin + t.top || t.rows != std::min(std::max(count - t.top, 0), Kind::kTileM)) fail("rows");
      ++seen[{t.expert, t.top, t.n}];
    }
  }
  for (const auto& [key, times] : seen) if (times != 1) fail("twice");
  for (int e = 0; e < experts; ++e) {
    const int begin = std::min(off[e], rows), count = std::min(off[e + 1], rows) - begin;
    const int ms = Kind::kContractsRows ? m_tiles : (count + Kind::kTileM - 1) / Kind::kTileM;
    for (int m = 0; m < ms; ++m) for (int n = 0; n < n_tiles; ++n) if (!seen.count({e, m * Kind::kTileM, n})) fail("missing");
  }
}

int main() {
  std::mt19937 rng(1);
  for (int i = 0; i < 6; ++i) {
    test<Fake<1, 2, false, false>>(rng); test<Fake<1, 2, false, true>>(rng);
    test<Fake<2, 2, false, false>>(rng); test<Fake<2, 2, false, true>>(rng);
    test<Fake<2, 2, true, false>>(rng); test<Fake<2, 2, true, true>>(rng);
    test<Fake<1, 3, false, false>>(rng); test<Fake<1, 3, false, true>>(rng);
    test<Fake<2, 3, false, false>>(rng); test<Fake<2, 3, false, true>>(rng);
  }
  printf("PASS tiles\n");
}
