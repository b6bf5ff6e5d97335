#include "common.cuh"
#include "reference.cuh"
#include "check.cuh"
#include "timing.cuh"

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  if (argc < 2) { printf("usage: harness check|time [shapes=12345] [variants=a,b] [kernels=up,down,...] [launches=5] [rounds=5] [quick]\n       harness profile <kernel> <shape> <variant>\n       harness list\n"); return 1; }
  Options o;
  if (std::string(argv[1]) == "list") { for (const Functions& v : variants()) printf("%s%s\n", v.name, v.dry ? " (no products: timing only)" : v.narrow ? " (bf16 swiglu only)" : ""); return 0; }
  if (std::string(argv[1]) == "profile") {
    if (argc < 5) { printf("usage: harness profile <kernel> <shape> <variant>\n"); return 1; }
    o.profile = true;
    o.kernels = std::string(",") + argv[2] + ",", o.shapes = argv[3], o.variants = std::string(",") + argv[4] + ",";
  }
  for (int i = 2; i < argc; ++i) {
    std::string a = argv[i];
    if (a.rfind("shapes=", 0) == 0) o.shapes = a.substr(7);
    else if (a.rfind("variants=", 0) == 0) o.variants = "," + a.substr(9) + ",";
    else if (a.rfind("kernels=", 0) == 0) o.kernels = "," + a.substr(8) + ",";
    else if (a.rfind("launches=", 0) == 0) o.launches = atoi(a.c_str() + 9);
    else if (a.rfind("rounds=", 0) == 0) o.rounds = std::max(1, atoi(a.c_str() + 7));
    else if (a == "quick") o.quick = true;
    else if (a == "verbose") o.verbose = true;
  }
  int n = 0;
  CK(cudaGetDeviceCount(&n));
  cudaDeviceProp prop;
  CK(cudaGetDeviceProperties(&prop, 0));
  printf("device %s, %d SMs\n", prop.name, prop.multiProcessorCount);
  if (std::string(argv[1]) == "check") return check_all(o);
  if (std::string(argv[1]) == "time" || o.profile) return time_all(o);
  return 1;
}
