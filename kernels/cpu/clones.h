// MOE_CLONES: compile a function once for each x86-64 level and let the loader choose. Empty elsewhere.
#pragma once

#if defined(MOE_HAS_TARGET_CLONES)
#define MOE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOE_CLONES
#endif
