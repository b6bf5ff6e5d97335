import re, sys
base=sys.argv[1]+'/'
def read(p): return open(base+p).read()
def fn(s,start,body):  # replaces the body of the function that begins with `start`
    i=s.index(start); j=s.index('{',i); d=0
    for k in range(j,len(s)):
        d+= s[k]=='{'; d-= s[k]=='}'
        if d==0: break
    return s[:j]+'{ '+body+' }'+s[k+1:]
out='#include "emu.h"\n'
def add(p,*edits):
    global out
    s=read(p)
    s=re.sub(r'#include.*\n','',s).replace('#pragma once','')
    s=re.sub(r'#pragma unroll.*\n','',s)
    for e in edits: s=e(s)
    assert 'asm' not in s,(p,[l for l in s.split('\n') if 'asm' in l])
    out+='\n// ==== '+p+'\n'+s
out+='''
namespace moe::cuda { constexpr int kWarp = 32; constexpr unsigned kAllLanes = 0xffffffffu; constexpr int kMaxDevices = 64;
template <class T> T ceil_div(T a, T b) { return (a + b - 1) / b; }
inline Status launched() { return {}; }
inline int native(Stream) { return 0; } }
'''
out+='namespace moe { constexpr int kMaxExperts = 1024; }\n'
add('include/grouped_ffn.h')
add('cuda/approximate.cuh',lambda s:s.replace('asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));','y = exp2f(x);'),lambda s:re.sub(r'asm\("rcp.*;\n','y = 1/x;\n',s))
add('cuda/activation.cuh',lambda s:re.sub(r'asm\("rcp[^\n]*','y = 1/(1.0f + exp_of(-x));',s))
add('cuda/ffn_pairs.cuh',lambda s:fn(s,'__device__ __forceinline__ uint32_t pack','return uint32_t(uint16_t(Format::from_real(first))) | uint32_t(uint16_t(Format::from_real(second))) << 16;'))
add('cuda/ffn_tiles.cuh')
add('cuda/ffn_sm80_tile.cuh',
  lambda s:fn(s,'__device__ __forceinline__ void wait_for_copies','emu_wait(kBehind);'),
  lambda s:fn(s,'__device__ __forceinline__ void commit_copies','emu_commit();'),
  lambda s:fn(s,'__device__ __forceinline__ void copy_or_clear','emu_copy(to, from, inside);'),
  lambda s:fn(s,'__device__ __forceinline__ void multiply(','emu_multiply<Format>(sums, a, b);'),
  lambda s:re.sub(r'asm volatile\("ldmatrix.*?;',"XX",s,flags=re.S) if False else s[:s.index('      if constexpr (kMajor == Major::kK) {\n        asm volatile("ldmatrix')]+'      emu_ldmatrix(words[i], address, kMajor == Major::kMN);\n'+s[s.index('    }\n  }\n\n private:\n  uint32_t first_'):])
add('cuda/ffn_sm80_epilogue.cuh')
add('cuda/ffn_sm80_kernel.cuh',lambda s:s.replace('extern __shared__ __align__(128) char storage[];','char* const storage = emu_shared;'))
add('cuda/grouped_ffn_archs.cuh')
def launch(s):
    s=fn(s,'int blocks_at_once()','return 3;')
    return re.sub(r'product_kernel<Kind><<<.*?;','emu_run(int(blocks), Kind::kThreads, [&] { product_kernel<Kind>(p); });',s)
add('cuda/ffn_sm80_launch.cuh',launch)
open('product.h','w').write(out)
