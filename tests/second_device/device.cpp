// A device of its own in main memory, so that a machine without a GPU can find tensors on the wrong device.
//
// PyTorch's PrivateUse1 key, with an allocator that hands out ordinary memory. What makes tensors and views is here;
// everything else goes to the CPU's kernels, after a look that no argument lies on the CPU. Convolution and group norm
// have hooks of their own in PyTorch; their arguments are seen as CPU tensors over the same memory.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/stack.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/native_group_norm_backward.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::SymInt;
using Sizes = c10::SymIntArrayRef;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;
constexpr auto kSecond = c10::DeviceType::PrivateUse1;
constexpr auto kKeys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);

// What PyTorch wants to know of a device.

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, c10::Device(kSecond, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(kSecond, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSecond; }
  c10::Device exchangeDevice(c10::Device) const override { return {kSecond, 0}; }
  c10::Device getDevice() const override { return {kSecond, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Randomness final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  Randomness() : c10::GeneratorImpl(c10::Device(kSecond, 0), kKeys) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    inner.set_state(Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(const_cast<c10::TensorImpl*>(&state))));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.get_state().getIntrusivePtr(); }
  Randomness* clone_impl() const override {
    auto* copy = new Randomness();
    copy->inner = inner.clone();
    return copy;
  }
};
at::Generator randomness = at::make_generator<Randomness>();

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return randomness; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Randomness>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto grown = memory.allocate(bytes);
    std::memcpy(grown.mutable_get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(grown));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// The same memory as a CPU tensor, and a result moved over.

Tensor plain(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_privateuseone(), "Expected all tensors to be on the same device: one is on ", tensor.device());
  auto storage = c10::Storage(
      c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
      c10::DataPtr(tensor.storage().mutable_data(), c10::Device(c10::kCPU)), nullptr, false);
  auto seen = at::empty({0}, tensor.options().device(c10::kCPU));
  seen.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  seen.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return seen;
}
OptionalTensor plain(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? OptionalTensor(plain(*tensor)) : std::nullopt;
}
Tensor moved(const Tensor& tensor) { return tensor.defined() ? tensor.to(c10::Device(kSecond, 0)) : tensor; }

// Making, viewing, copying.

Tensor empty(
    Sizes size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device>,
    std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, kKeys, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(
    Sizes size, Sizes stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory, kKeys, c10::dtype_or_default(dtype));
}
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  auto target = to.is_cpu() ? to : plain(to);
  target.copy_(from.is_cpu() ? from : plain(from));
  return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}
Tensor as_strided(const Tensor& tensor, Sizes size, Sizes stride, std::optional<SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}
Tensor view(const Tensor& tensor, Sizes size) { return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size)); }
Tensor reshape_alias(const Tensor& tensor, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
const Tensor& resize_(const Tensor& tensor, Sizes size, std::optional<c10::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (tensor.sizes() == sizes) return tensor;  // its strides, as those of a diagonal, stay
  size_t bytes = (c10::multiply_integers(sizes) + tensor.storage_offset()) * tensor.itemsize();
  if (tensor.storage().nbytes() < bytes) Hooks().resizePrivateUse1Bytes(tensor.storage(), bytes);
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}
Tensor& set_storage(Tensor& tensor, c10::Storage source, SymInt offset, Sizes size, Sizes stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return tensor;
}
Tensor& set_whole_storage(Tensor& tensor, c10::Storage source) {
  auto count = static_cast<int64_t>(source.nbytes() / tensor.itemsize());
  return set_storage(tensor, source, 0, {SymInt(count)}, {SymInt(1)});
}
Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  return set_storage(tensor, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}
at::Scalar item(const Tensor& tensor) { return at::_local_scalar_dense(plain(tensor)); }

// Layers that a device has to bring itself.

Tensor convolution(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Sizes stride, Sizes padding, Sizes dilation,
    bool transposed, Sizes output_padding, SymInt groups) {
  return moved(at::convolution_symint(
      plain(x), plain(weight), plain(bias), stride, padding, dilation, transposed, output_padding, groups));
}
Three convolution_backward(
    const Tensor& slope, const Tensor& x, const Tensor& weight, Sizes stride, Sizes padding, Sizes dilation,
    bool transposed, Sizes output_padding, SymInt groups, std::array<bool, 3> mask) {
  std::vector<SymInt> bias{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  at::OptionalSymIntArrayRef sizes;
  if (mask[2]) sizes = bias;
  auto [a, b, c] = at::convolution_backward_symint(
      plain(slope), plain(x), plain(weight), sizes, stride, padding, dilation, transposed, output_padding, groups, mask);
  return {moved(a), moved(b), moved(c)};
}
Three group_norm(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, SymInt rows, SymInt channels,
    SymInt places, int64_t groups, double eps) {
  auto [y, mean, deviation] = at::native_group_norm_symint(
      plain(x).contiguous(), plain(weight), plain(bias), rows, channels, places, groups, eps);
  return {moved(y), moved(mean), moved(deviation)};
}
Three group_norm_backward(
    const Tensor& slope, const Tensor& x, const Tensor& mean, const Tensor& deviation, const OptionalTensor& weight,
    SymInt rows, SymInt channels, SymInt places, int64_t groups, std::array<bool, 3> mask) {
  auto [a, b, c] = at::native_group_norm_backward_symint(
      plain(slope).contiguous(), plain(x).contiguous(), plain(mean), plain(deviation), plain(weight), rows, channels,
      places, groups, mask);
  return {moved(a), moved(b), moved(c)};
}

// Everything else: as a GPU, refuse what lies on the CPU (but for single numbers and indices), then compute there.

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().operator_name().name;
  const bool indexing = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0;
  const size_t count = op.schema().arguments().size();
  bool away = false;
  auto look = [&](const Tensor& tensor) { away |= tensor.defined() && !tensor.is_privateuseone() && tensor.dim() > 0; };
  for (size_t i = 0; i < count; i++) {
    auto& value = torch::jit::peek(*stack, i, count);
    if (value.isGenerator() && value.toGenerator().device().type() == kSecond) {
      value = at::Generator(value.toGenerator().get<Randomness>()->inner);
    } else if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isList() && !indexing) {
      for (const c10::IValue& part : value.toListRef()) {
        if (part.isTensor()) look(part.toTensor());
      }
    }
  }
  TORCH_CHECK(!away, "Expected all tensors to be on the same device, but found at least two, in ", name);
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_local_scalar_dense", &item);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("native_group_norm", &group_norm);
  m.impl("native_group_norm_backward", &group_norm_backward);
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("start", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
}
