#include "torch_abi.h"

#include <dlfcn.h>

#include <string>

#include "glibc.h"

namespace fastkd {

TorchAbi torch_abi;

const char* load_torch_abi(const char* path, const char* cuda_path) {
  static std::string error;
  // Finds the library that is already loaded, also if its symbols are local.
  void* torch = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) {
    error = std::string("torch's library is not loaded from ") + path;
    return error.c_str();
  }
#define FASTKD_FIND(name) \
  torch_abi.name = reinterpret_cast<decltype(torch_abi.name)>(dlsym(torch, #name)); \
  if (torch_abi.name == nullptr) { \
    error = "this torch has no " #name " in its stable ABI; torch 2.10 or newer has"; \
    return error.c_str(); \
  }
  FASTKD_TORCH_FUNCTIONS(FASTKD_FIND)
#undef FASTKD_FIND
  if (void* torch_cuda = dlopen(cuda_path, RTLD_LAZY | RTLD_NOLOAD))
    torch_abi.aoti_torch_get_current_cuda_stream = reinterpret_cast<decltype(&::aoti_torch_get_current_cuda_stream)>(
        dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  return nullptr;
}

}  // namespace fastkd
