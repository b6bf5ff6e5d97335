# moe_cuda_archs(archs reason): the CUDA architectures to build for, by MOE_CUDA and MOE_CUDA_ARCHS; or "" and why none.
#   AUTO  those of the GPUs in this machine
#   ON    all
#   OFF   none
set(MOE_CUDA "AUTO" CACHE STRING "Build the CUDA kernels: AUTO (where a GPU is seen), ON or OFF")
set_property(CACHE MOE_CUDA PROPERTY STRINGS AUTO ON OFF)
set(MOE_CUDA_ARCHS "" CACHE STRING "CUDA architectures, as CMAKE_CUDA_ARCHITECTURES spells them, in place of MOE_CUDA's")

# Compute capabilities like "9.0", a list.
function(moe_gpus result)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  RESULT_VARIABLE status OUTPUT_VARIABLE text ERROR_QUIET)
  if(NOT status EQUAL 0)
    set(text "")
    if(EXISTS /dev/nvidiactl OR EXISTS /dev/dxg)  # a container without nvidia-smi
      set(capabilities "import torch.cuda as c\nfor i in range(c.device_count()): print('%d.%d' % c.get_device_capability(i))")
      execute_process(COMMAND "${Python_EXECUTABLE}" -c "${capabilities}" OUTPUT_VARIABLE text ERROR_QUIET)
    endif()
  endif()
  string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${text}")
  list(REMOVE_DUPLICATES capabilities)
  set(${result} "${capabilities}" PARENT_SCOPE)
endfunction()

function(moe_cuda_archs archs reason)
  set(chosen "")
  if(NOT MOE_CUDA MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "MOE_CUDA must be AUTO, ON or OFF, got ${MOE_CUDA}")
  elseif(MOE_CUDA STREQUAL "OFF")
    set(${reason} "MOE_CUDA=OFF" PARENT_SCOPE)
  elseif(MOE_CUDA STREQUAL "ON")
    set(chosen 80 90a)
  else()
    moe_gpus(gpus)
    foreach(gpu IN LISTS gpus)
      if(gpu VERSION_GREATER_EQUAL 9.0 AND gpu VERSION_LESS 10.0)
        list(APPEND chosen 90a)  # wgmma and TMA
      elseif(gpu VERSION_GREATER_EQUAL 8.0)
        list(APPEND chosen 80)  # code for 8.x, and PTX for what came after 9.0
      endif()
    endforeach()
    list(REMOVE_DUPLICATES chosen)
    list(SORT chosen)
    if(gpus)
      set(${reason} "they need compute capability 8.0, this machine has ${gpus}" PARENT_SCOPE)
    else()
      set(${reason} "MOE_CUDA=AUTO sees no GPU; MOE_CUDA=ON builds them all the same" PARENT_SCOPE)
    endif()
  endif()
  if(chosen AND MOE_CUDA_ARCHS)
    set(chosen "${MOE_CUDA_ARCHS}")
  endif()
  set(${archs} "${chosen}" PARENT_SCOPE)
endfunction()
