// isotile._C: the kernels, bound to a signature once and then called with tensors only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "base/dtype.h"
#include "base/parallel.h"
#include "base/tensor_view.h"
#include "signature.h"

namespace py = pybind11;

namespace isotile {
using Kernel = void (*)(const TensorView*, const double*);
struct NamedKernel {
  const char* name;
  Kernel kernel;
};
}  // namespace isotile

#define ISOTILE_ISA scalar
#include "bind_isa.inc"
#undef ISOTILE_ISA
#if ISOTILE_BUILT_avx2
#define ISOTILE_ISA avx2
#include "bind_isa.inc"
#undef ISOTILE_ISA
#endif
#if ISOTILE_BUILT_avx512
#define ISOTILE_ISA avx512
#include "bind_isa.inc"
#undef ISOTILE_ISA
#endif
#if ISOTILE_BUILT_avx512_bf16
#define ISOTILE_ISA avx512_bf16
#include "bind_isa.inc"
#undef ISOTILE_ISA
#endif
#if ISOTILE_BUILT_amx
#define ISOTILE_ISA amx
#include "bind_isa.inc"
#undef ISOTILE_ISA
#endif
#if ISOTILE_BUILT_neon
#define ISOTILE_ISA neon
#include "bind_isa.inc"
#undef ISOTILE_ISA
#endif

namespace isotile {
namespace {

struct InstructionSet {
  const char* name;
  const NamedKernel* kernels;
};

// From the least to the most capable.
const InstructionSet instruction_sets[] = {
    {"scalar", scalar::kernels},
#if ISOTILE_BUILT_avx2
    {"avx2", avx2::kernels},
#endif
#if ISOTILE_BUILT_avx512
    {"avx512", avx512::kernels},
#endif
#if ISOTILE_BUILT_avx512_bf16
    {"avx512_bf16", avx512_bf16::kernels},
#endif
#if ISOTILE_BUILT_amx
    {"amx", amx::kernels},
#endif
#if ISOTILE_BUILT_neon
    {"neon", neon::kernels},
#endif
};

Kernel find_kernel(const std::string& set, const std::string& op) {
  for (const InstructionSet& candidate : instruction_sets) {
    if (set != candidate.name) continue;
    if (!cpu_runs(candidate.name)) throw std::invalid_argument("this CPU does not run the instruction set " + set);
    for (const NamedKernel* named = candidate.kernels; named->name; ++named) {
      if (op == named->name) return named->kernel;
    }
    throw std::invalid_argument("no C++ kernel named " + op);
  }
  throw std::invalid_argument("this build has no instruction set " + set);
}

constexpr int kMaxTensors = 20;
constexpr int kMaxScalars = 16;
// Below this many elements a kernel takes about as long as giving the interpreter's lock away and taking it again.
constexpr int64_t kKeepLockElements = 4096;

// A plain CPython type: its vectorcall costs a fraction of a pybind11 call.
struct Plan {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  Kernel kernel;
  int tensors;
  bool release_lock;
  double scalars[kMaxScalars];
  TensorView views[kMaxTensors];
};

PyObject* data_ptr_name = nullptr;
PyTypeObject* plan_type = nullptr;

void set_python_error() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "unknown C++ exception in an isotile kernel");
  }
}

PyObject* call_plan(PyObject* self, PyObject* const* args, size_t flagged_count, PyObject* keywords) {
  const Plan* plan = reinterpret_cast<const Plan*>(self);
  const Py_ssize_t count = PyVectorcall_NARGS(flagged_count);
  if (keywords && PyTuple_GET_SIZE(keywords) > 0) {
    PyErr_SetString(PyExc_TypeError, "a plan takes tensors by position only");
    return nullptr;
  }
  if (count != plan->tensors) {
    PyErr_Format(PyExc_TypeError, "this plan takes %d tensors, got %zd", plan->tensors, count);
    return nullptr;
  }
  TensorView views[kMaxTensors];  // a copy: several threads may run one plan at once
  for (Py_ssize_t i = 0; i < count; ++i) {
    const TensorView& planned = plan->views[i];
    if (args[i] == Py_None) {
      if (planned.present()) {
        PyErr_Format(PyExc_TypeError, "tensor %zd of this plan is not optional, got None", i);
        return nullptr;
      }
      continue;
    }
    if (!planned.present()) {
      PyErr_Format(PyExc_TypeError, "this plan was made with None for tensor %zd", i);
      return nullptr;
    }
    void* data = nullptr;
    if (!address_of(args[i], &data)) {
      PyObject* address = PyObject_VectorcallMethod(data_ptr_name, args + i, 1, nullptr);
      if (!address) return nullptr;
      data = PyLong_AsVoidPtr(address);
      Py_DECREF(address);
      if (!data && PyErr_Occurred()) return nullptr;
    }
    if (!data && !std::count(planned.size, planned.size + planned.ndim, 0)) {
      PyErr_Format(PyExc_RuntimeError,
                   "tensor %zd of this plan has no memory behind its elements, as a zero tensor of PyTorch's forward-mode "
                   "differentiation; give it some, for example with clone()", i);
      return nullptr;
    }
    TensorView& view = views[i];
    view.data = data;
    view.dtype = planned.dtype;
    view.ndim = planned.ndim;
    std::memcpy(view.size, planned.size, sizeof(int64_t) * static_cast<size_t>(planned.ndim));
    std::memcpy(view.stride, planned.stride, sizeof(int64_t) * static_cast<size_t>(planned.ndim));
  }
  PyThreadState* state = plan->release_lock ? PyEval_SaveThread() : nullptr;
  bool failed = false;
  std::exception_ptr error;
  try {
    plan->kernel(views, plan->scalars);
  } catch (...) {
    failed = true;
    error = std::current_exception();
  }
  if (state) PyEval_RestoreThread(state);
  if (failed) {
    try {
      std::rethrow_exception(error);
    } catch (...) {
      set_python_error();
    }
    return nullptr;
  }
  Py_RETURN_NONE;
}

void delete_plan(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef signature_functions[] = {
    {"set_signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(set_signature)), METH_FASTCALL,
     "What signature() asks: (DLPack table or None, plain types, is_neg, modes, describe)."},
    {"signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(signature)), METH_FASTCALL,
     "A hashable signature of tensors or None; None where one is not plain or something special is in force."},
    {nullptr, nullptr, 0, nullptr},
};
PyMemberDef plan_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Plan, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};
PyType_Slot plan_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(delete_plan)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, plan_members},
    {Py_tp_doc, const_cast<char*>("A kernel bound to a signature: plan(*tensors_or_None).")},
    {0, nullptr},
};
PyType_Spec plan_spec = {
    "isotile._C.Plan",
    sizeof(Plan),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    plan_slots,
};

using ViewTuple = std::tuple<int, std::vector<int64_t>, std::vector<int64_t>>;

py::object make_plan(const std::string& set, const std::string& op, const std::vector<std::optional<ViewTuple>>& views,
                     const std::vector<double>& scalars) {
  const Kernel kernel = find_kernel(set, op);
  if (views.size() > kMaxTensors) throw std::invalid_argument("too many tensors for one kernel");
  if (scalars.size() > kMaxScalars) throw std::invalid_argument("too many scalars for one kernel");
  auto* plan = reinterpret_cast<Plan*>(plan_type->tp_alloc(plan_type, 0));
  if (!plan) throw py::error_already_set();
  py::object owner = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(plan));
  plan->vectorcall = call_plan;
  plan->kernel = kernel;
  plan->tensors = static_cast<int>(views.size());
  for (size_t i = 0; i < scalars.size(); ++i) plan->scalars[i] = scalars[i];
  int64_t elements = 0;
  for (size_t i = 0; i < views.size(); ++i) {
    TensorView& view = plan->views[i];
    view = TensorView{};
    if (!views[i]) continue;
    const auto& [dtype, sizes, strides] = *views[i];
    if (dtype < 0 || dtype > static_cast<int>(DType::kUInt8)) throw std::invalid_argument("unknown dtype code");
    if (sizes.size() != strides.size()) throw std::invalid_argument("sizes and strides differ in length");
    if (sizes.size() > kMaxDims) throw std::invalid_argument("too many dimensions");
    view.dtype = static_cast<DType>(dtype);
    view.ndim = static_cast<int32_t>(sizes.size());
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] < 0 || strides[d] < 0) throw std::invalid_argument("negative size or stride");
      view.size[d] = sizes[d];
      view.stride[d] = strides[d];
    }
    elements += view.numel();
  }
  plan->release_lock = elements > kKeepLockElements;
  return owner;
}

}  // namespace
}  // namespace isotile

PYBIND11_MODULE(_C, module) {
  using namespace isotile;
  data_ptr_name = PyUnicode_InternFromString("data_ptr");
  if (!data_ptr_name) throw py::error_already_set();
  plan_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&plan_spec));
  if (!plan_type) throw py::error_already_set();
  module.attr("Plan") = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(plan_type));

  module.def(
      "instruction_sets",
      [] {
        std::vector<std::pair<std::string, bool>> sets;
        for (const InstructionSet& set : instruction_sets) sets.emplace_back(set.name, cpu_runs(set.name));
        return sets;
      },
      "The compiled instruction sets, least capable first, each with whether this CPU runs it.");
  module.def(
      "operators",
      [] {
        std::vector<std::string> names;
        for (const NamedKernel* named = scalar::kernels; named->name; ++named) names.emplace_back(named->name);
        return names;
      },
      "The operators that have a kernel.");
  module.def(
      "set_parallel",
      [](uintptr_t parallel_for, uintptr_t num_threads) {
        set_parallel(reinterpret_cast<void*>(parallel_for), reinterpret_cast<void*>(num_threads));
      },
      py::arg("parallel_for"), py::arg("num_threads"),
      "The addresses of libtorch_cpu's torch_parallel_for and torch_get_num_threads; 0 for either: run serially.");
  if (PyModule_AddFunctions(module.ptr(), signature_functions) != 0) throw py::error_already_set();
  module.attr("max_dims") = kMaxDims;
  module.attr("compiler") = __VERSION__;
  module.def("num_threads", &num_threads, "Threads that a kernel called now would use.");
  module.def("plan", &make_plan, py::arg("isa"), py::arg("op"), py::arg("views"), py::arg("scalars"),
             "Binds a kernel to views (dtype code, sizes, strides; None: absent) and scalars; call it with the tensors.");
}
