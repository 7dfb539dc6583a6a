// An accelerator for machines that have none: its tensors lie in ordinary memory and CPU kernels compute on them, but
// PyTorch takes it for a device of its own. As on a GPU, tensors on two devices do not mix, its random numbers are its
// own, it has its own autocast, and NumPy cannot read it.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

#include <set>

namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

c10::Device device() { return {KIND, 0}; }

// --- memory, streams, generators -------------------------------------------------------------------------------------

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    return {data, data, &c10::free_cpu, device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
Allocator allocator;
REGISTER_ALLOCATOR(KIND, &allocator)

c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Generator final : c10::GeneratorImpl {
  at::Generator on_cpu = at::detail::createCPUGenerator();

  Generator() : GeneratorImpl(::device(), KEYS) {}
  void set_current_seed(uint64_t seed) override { on_cpu.set_current_seed(seed); }
  uint64_t current_seed() const override { return on_cpu.current_seed(); }
  uint64_t seed() override { return on_cpu.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { on_cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return on_cpu.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator();
    copy->on_cpu = on_cpu.clone();
    return copy;
  }
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

const at::Generator& on_cpu(const at::Generator& generator) {
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->on_cpu;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
};
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// --- tensors ---------------------------------------------------------------------------------------------------------

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, KEYS, at::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, at::dtype_or_default(dtype));
}

// The same memory as a tensor on the CPU.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != KIND) return tensor;
  auto storage = tensor.storage();
  const int64_t size = storage.nbytes() / tensor.element_size();
  auto whole = at::from_blob(storage.mutable_data(), {size}, [storage](void*) {}, at::dtype(tensor.dtype()));
  return whole.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

OptionalTensor on_cpu(const OptionalTensor& tensor) { return tensor ? OptionalTensor(on_cpu(*tensor)) : std::nullopt; }

Tensor on_device(const Tensor& tensor) { return tensor.defined() ? tensor.to(device()) : tensor; }

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.numel()) on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& tensor) { return on_cpu(tensor).item(); }

Tensor& set_storage(Tensor& tensor, at::Storage storage) {
  const int64_t size = storage.nbytes() / tensor.element_size();
  return at::native::set_storage_cpu_(tensor, storage, 0, {size}, {});
}

Tensor view(const Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

const Tensor& resize(const Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(size), format);
}

// --- operators -------------------------------------------------------------------------------------------------------

// Those that take a tensor on the CPU beside one on a GPU.
const std::set<std::string> MIXING = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"};

// Any operator: computed on the CPU, after the checks that a GPU makes.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& parameters = op.schema().arguments();
  const std::string name = toString(op.operator_name());
  bool here = false, elsewhere = false;
  auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == KIND) here = true;
    else if (tensor.dim()) elsewhere = true;  // a number goes with any device
  };
  for (size_t i = 0; i < parameters.size(); ++i) {
    auto& argument = (*stack)[stack->size() - parameters.size() + i];
    if (argument.isTensor()) look(argument.toTensor());
    if (argument.isTensorList()) for (const auto& tensor : argument.toTensorVector()) look(tensor);
    if (argument.isGenerator()) {
      TORCH_CHECK(argument.toGenerator().device() == device(), name, ": a generator on another device than the tensor");
      argument = on_cpu(argument.toGenerator());
    } else if (argument.isNone() && parameters[i].name() == "generator") {
      argument = on_cpu(default_generator());
    }
  }
  TORCH_CHECK(!(here && elsewhere) || MIXING.count(name), name, ": expected all tensors to be on the same device");
  at::native::cpu_fallback(op, stack);
}

// PyTorch has none of these for a device it does not know, or does not say that they change their arguments or draw.
Tensor convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  TORCH_CHECK(x.device() == weight.device(), "convolution: expected all tensors to be on the same device");
  return on_device(at::convolution(on_cpu(x), on_cpu(weight), on_cpu(bias), stride, padding, dilation, transposed,
                                   output_padding, groups));
}

Tensor _convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
                    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                    int64_t groups, bool, bool, bool, bool) {
  return ::convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, at::OptionalIntArrayRef bias_sizes,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> mask) {
  auto [of_x, of_weight, of_bias] =
      at::convolution_backward(on_cpu(gradient), on_cpu(x), on_cpu(weight), bias_sizes, stride, padding, dilation,
                               transposed, output_padding, groups, mask);
  return {on_device(of_x), on_device(of_weight), on_device(of_bias)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& mean,
    const OptionalTensor& variance, bool training, double momentum, double eps) {
  auto [out, batch_mean, batch_scale] = at::native_batch_norm(
      on_cpu(x), on_cpu(weight), on_cpu(bias), on_cpu(mean), on_cpu(variance), training, momentum, eps);
  return {on_device(out), on_device(batch_mean), on_device(batch_scale)};
}

std::tuple<Tensor, Tensor> dropout(const Tensor& x, double p, std::optional<bool> train) {
  const double share = train.value_or(true) ? 1 - p : 1;
  auto kept = at::empty_like(x, x.options().dtype(at::kBool)).bernoulli_(share);
  return {x * kept * (share > 0 ? 1 / share : 0), kept};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", ::empty);
  m.impl("empty_strided", ::empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("view", ::view);
  m.impl("resize_", ::resize);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("convolution", ::convolution);
  m.impl("_convolution", ::_convolution);
  m.impl("convolution_backward", ::convolution_backward);
  m.impl("native_batch_norm", batch_norm);
  m.impl("native_dropout", ::dropout);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

}  // namespace

namespace at::autocast {
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define IN_LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(IN_LOWER)
#define IN_SINGLE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(IN_SINGLE)
#define IN_SINGLE_IF_NAMED(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
  AT_FORALL_FP32_SET_OPT_DTYPE(IN_SINGLE_IF_NAMED)
#define IN_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(IN_WIDEST)
}
}  // namespace at::autocast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("manual_seed", [](uint64_t seed) { at::Generator(default_generator()).set_current_seed(seed); });
  m.def("get_rng_state", [] { return Tensor(default_generator().unsafeGetGeneratorImpl()->get_state()); });
  m.def("set_rng_state", [](const Tensor& state) {
    default_generator().unsafeGetGeneratorImpl()->set_state(*state.unsafeGetTensorImpl());
  });
}
