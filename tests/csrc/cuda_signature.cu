// csrc/cuda_host.cpp declares cudaLaunchHostFunc by itself. This holds the declaration against the CUDA runtime's header.
#include <cuda_runtime.h>

#include <type_traits>

using Function = void (*)(void*);
static_assert(std::is_same<cudaHostFn_t, void(CUDART_CB*)(void*)>::value, "a host function takes a pointer");
static_assert(std::is_convertible<Function, cudaHostFn_t>::value, "and ours is one");
static_assert(std::is_pointer<cudaStream_t>::value && sizeof(cudaStream_t) == sizeof(void*), "a stream is a pointer");
static_assert(sizeof(cudaError_t) == sizeof(int), "an error is an int");
static_assert(
    std::is_same<decltype(&cudaLaunchHostFunc), cudaError_t(CUDARTAPI*)(cudaStream_t, cudaHostFn_t, void*)>::value,
    "and these are the arguments");
