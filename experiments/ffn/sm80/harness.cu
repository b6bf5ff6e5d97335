#include "common.cuh"
#include "reference.cuh"
#include "check.cuh"
#include "timing.cuh"

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  if (argc < 2) { printf("usage: harness80 check|time [shapes=1234] [variants=a,b] [kernels=up,down,...] [quick]\n"); return 1; }
  Options o;
  for (int i = 2; i < argc; ++i) {
    std::string a = argv[i];
    if (a.rfind("shapes=", 0) == 0) o.shapes = a.substr(7);
    else if (a.rfind("variants=", 0) == 0) o.variants = "," + a.substr(9) + ",";
    else if (a.rfind("kernels=", 0) == 0) o.kernels = "," + a.substr(8) + ",";
    else if (a.rfind("launches=", 0) == 0) o.launches = atoi(a.c_str() + 9);
    else if (a == "quick") o.quick = true;
    else if (a == "verbose") o.verbose = true;
  }
  int n = 0;
  CK(cudaGetDeviceCount(&n));
  cudaDeviceProp prop;
  CK(cudaGetDeviceProperties(&prop, 0));
  printf("device %s, %d SMs\n", prop.name, prop.multiProcessorCount);
  printf("sm90 available %d, sm80 available %d\n", int(sm90::available()), int(sm80::available()));
  const auto began = std::chrono::steady_clock::now();
  const auto took = [&](int code) { printf("%.1f s\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count()); return code; };
  if (std::string(argv[1]) == "check") return took(check_all(o));
  if (std::string(argv[1]) == "time") return took(time_all(o));
  return 1;
}
