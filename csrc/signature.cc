#include "signature.h"

#include <cstdint>
#include <cstring>

namespace isotile {
namespace {

// DLPack 1.x: https://dmlc.github.io/dlpack/latest/c_api.html. Later minor versions keep the layout of what is here.
struct DlTensor {
  void* data;
  int32_t device[2];  // type, number
  int32_t ndim;
  uint32_t dtype;  // code and bits in a byte each, lanes in two
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};
struct DlTable {
  uint32_t major, minor;
  DlTable* older;
  void* owning[3];
  int (*borrow)(void* object, DlTensor* tensor);  // 0, or a Python error is set; may be null
  void* work_stream;
};

int (*borrow)(void*, DlTensor*) = nullptr;
PyObject *types = nullptr, *is_neg = nullptr, *modes = nullptr, *describe = nullptr;

// 1: true, 0: false, -1: a Python error is set.
int truth_of(PyObject* result) {
  if (!result) return -1;
  const int truth = PyObject_IsTrue(result);
  Py_DECREF(result);
  return truth;
}

int plain(PyObject* tensor) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); ++i) {
    if (PyTuple_GET_ITEM(types, i) != type) continue;
    const int negated = truth_of(PyObject_Vectorcall(is_neg, &tensor, 1, nullptr));
    return negated < 0 ? -1 : !negated;
  }
  return 0;
}

}  // namespace

PyObject* set_signature(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[3])) {
    PyErr_SetString(PyExc_TypeError, "set_signature(table, types, is_neg, modes, describe)");
    return nullptr;
  }
  borrow = nullptr;
  if (args[0] != Py_None) {
    auto* table = static_cast<DlTable*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
    if (!table) return nullptr;
    while (table && table->major != 1) table = table->older;
    if (table) borrow = table->borrow;
  }
  PyObject** const kept[] = {&types, &is_neg, &modes, &describe};
  for (int i = 0; i < 4; ++i) {
    Py_INCREF(args[i + 1]);
    Py_XSETREF(*kept[i], args[i + 1]);
  }
  Py_RETURN_NONE;
}

PyObject* signature(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  if (!describe) {
    PyErr_SetString(PyExc_RuntimeError, "set_signature was not called");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(modes); ++i) {
    const int special = truth_of(PyObject_CallNoArgs(PyTuple_GET_ITEM(modes, i)));
    if (special < 0) return nullptr;
    if (special) Py_RETURN_NONE;
  }
  int64_t record[128];
  int64_t* at = record;
  bool known = borrow != nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) {
      if (at == record + 128) known = false;
      if (known) *at++ = -1;
      continue;
    }
    const int is_plain = plain(tensors[i]);
    if (is_plain < 0) return nullptr;
    if (!is_plain) Py_RETURN_NONE;
    DlTensor t;
    if (!known) continue;
    if (borrow(tensors[i], &t) != 0) {
      PyErr_Clear();
      known = false;
    } else if (at + 2 + 2 * t.ndim > record + 128) {
      known = false;
    } else {
      // No device type is negative, and none of these numbers reaches 2^32.
      at[0] = static_cast<int64_t>(static_cast<uint64_t>(t.device[0]) << 32 | static_cast<uint32_t>(t.device[1]));
      at[1] = static_cast<int64_t>(static_cast<uint64_t>(t.dtype) << 32 | static_cast<uint32_t>(t.ndim));
      at += 2;
      const size_t bytes = sizeof(int64_t) * static_cast<size_t>(t.ndim);
      if (bytes == 0) continue;
      std::memcpy(at, t.shape, bytes);
      std::memcpy(at + t.ndim, t.strides, bytes);
      at += 2 * t.ndim;
    }
  }
  if (!known) return PyObject_Vectorcall(describe, tensors, static_cast<size_t>(count), nullptr);
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(record),
                                   static_cast<Py_ssize_t>(sizeof(int64_t)) * (at - record));
}

bool address_of(PyObject* tensor, void** address) {
  DlTensor t;
  if (!borrow) return false;
  if (borrow(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  *address = static_cast<char*>(t.data) + t.byte_offset;
  return true;
}

}  // namespace isotile
