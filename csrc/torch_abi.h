// The part of PyTorch's stable C ABI that the extension uses.
//
// The functions are declared here rather than included from torch's headers, so that an isolated build does not
// install a second torch of several gigabytes. They are looked up by name in the loaded torch (torch_abi.cpp):
// nothing is linked, and one binary works with every torch from 2.10 on. tests/ops/test_native_build.py compiles
// these declarations together with torch's headers, where a differing signature is a compile error.
#pragma once

#include <cstddef>
#include <cstdint>

struct AtenTensorOpaque;
class TorchLibraryOpaque;
struct StableListOpaque;

extern "C" {
using AtenTensorHandle = AtenTensorOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using StableListHandle = StableListOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** ret_data_ptr);
AOTITorchError aoti_torch_get_storage_size(AtenTensorHandle tensor, int64_t* ret_size);
AOTITorchError aoti_torch_get_storage_offset(AtenTensorHandle tensor, int64_t* ret_storage_offset);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret_dim);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle tensor, int64_t* ret_numel);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** ret_sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** ret_strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret_dtype);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* ret_device_index);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_library_init_fragment(const char* ns, const char* file, uint32_t line,
                                                TorchLibraryHandle* ret);
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* k, const char* file, uint32_t line,
                                            TorchLibraryHandle* ret);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle self, const char* schema);
AOTITorchError torch_library_impl(TorchLibraryHandle self, const char* name,
                                  void (*fn)(StableIValue*, uint64_t, uint64_t), uint64_t extension_build_version);
AOTITorchError torch_list_size(StableListHandle list_handle, size_t* size);
AOTITorchError torch_list_get_item(StableListHandle list_handle, size_t index, StableIValue* element);
AOTITorchError torch_delete_list(StableListHandle list_handle);
AOTITorchError torch_get_num_threads(uint32_t* out_num_threads);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, void (*func)(int64_t, int64_t, void*),
                                  void* ctx);
}

#define FASTKD_TORCH_FUNCTIONS(apply) \
  apply(aoti_torch_get_data_ptr) apply(aoti_torch_get_storage_size) apply(aoti_torch_get_storage_offset) \
      apply(aoti_torch_get_dim) apply(aoti_torch_get_numel) apply(aoti_torch_get_sizes) apply(aoti_torch_get_strides) \
          apply(aoti_torch_get_dtype) apply(aoti_torch_get_device_index) apply(aoti_torch_delete_tensor_object) \
              apply(aoti_torch_library_init_fragment) apply(aoti_torch_library_init_impl) \
                  apply(aoti_torch_library_def) apply(torch_library_impl) apply(torch_list_size) \
                      apply(torch_list_get_item) apply(torch_delete_list) apply(torch_get_num_threads) \
                          apply(torch_parallel_for)

namespace fastkd {

// The functions above, found in the loaded torch.
struct TorchAbi {
#define FASTKD_MEMBER(name) decltype(&::name) name;
  FASTKD_TORCH_FUNCTIONS(FASTKD_MEMBER)
#undef FASTKD_MEMBER
  decltype(&::aoti_torch_get_current_cuda_stream) aoti_torch_get_current_cuda_stream;  // null in a torch without CUDA
};

extern TorchAbi torch_abi;

// Fills torch_abi from the loaded libtorch_cpu at `path` and, if loaded, libtorch_cuda at `cuda_path`. Returns nullptr,
// or what is missing.
const char* load_torch_abi(const char* path, const char* cuda_path);

// The ABI version that the extension targets: torch 2.10.
constexpr uint64_t kTorchVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);

}  // namespace fastkd
