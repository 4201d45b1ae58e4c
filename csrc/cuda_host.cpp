#include "cuda_host.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <stdexcept>

namespace kt {
namespace {

// cudaLaunchHostFunc (CUDA Runtime API, Execution Control); tests/csrc/cuda_signature.cu holds it against the header.
using LaunchHostFunc = int (*)(void* stream, void (*function)(void*), void* argument);

int find_cudart(dl_phdr_info* info, size_t, void* found) {
  const char* name = std::strrchr(info->dlpi_name, '/');
  name = name ? name + 1 : info->dlpi_name;
  if (std::strncmp(name, "libcudart", 9) != 0) return 0;
  *static_cast<std::string*>(found) = info->dlpi_name;
  return 1;
}

LaunchHostFunc resolve() {
  const std::string file = loaded_cudart();
  if (file.empty()) throw std::runtime_error("no CUDA runtime (libcudart) is loaded: this torch has no CUDA");
  void* library = dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "cudaLaunchHostFunc") : nullptr;
  if (!symbol) throw std::runtime_error(file + " has no cudaLaunchHostFunc");
  return reinterpret_cast<LaunchHostFunc>(symbol);
}

}  // namespace

std::string loaded_cudart() {
  std::string file;
  dl_iterate_phdr(find_cudart, &file);
  return file;
}

void launch_host_function(void* stream, void (*function)(void*), void* argument) {
  static const LaunchHostFunc launch = resolve();
  const int code = launch(stream, function, argument);
  if (code != 0) throw std::runtime_error("cudaLaunchHostFunc failed with code " + std::to_string(code));
}

}  // namespace kt
