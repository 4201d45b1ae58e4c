// Host functions on a CUDA stream, through the CUDA runtime that torch has loaded into this process. Nothing of CUDA is
// needed to compile or to install this.
#pragma once

#include <string>

namespace kt {

// The file name of a loaded libcudart; empty: none is loaded.
std::string loaded_cudart();

// Enqueues function(argument) on a cudaStream_t. Throws std::runtime_error where no CUDA runtime is loaded, or with its
// error code.
void launch_host_function(void* stream, void (*function)(void*), void* argument);

}  // namespace kt
