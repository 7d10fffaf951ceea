// What PyTorch's C table of DLPack tells of a tensor in one call, without libtorch: its address, and its signature as
// bytes for a plan's key. Reading the same through Python attributes takes longer than a small product.
#pragma once
#include <Python.h>

namespace isotile {

// Sets up what signature() asks. table: `torch.Tensor.__dlpack_c_exchange_api__` or None; types: the plain tensor
// types; is_neg: the method's descriptor; modes: functions whose true results mean that something special is in force;
// describe: the signature of tensors that the table does not know.
PyObject* set_signature(PyObject*, PyObject* const* args, Py_ssize_t count);

// signature(*tensors or None): equal for equal shapes, strides, dtypes and devices. None where a tensor is not plain or
// something special is in force.
PyObject* signature(PyObject*, PyObject* const* tensors, Py_ssize_t count);

// Whether the table knows the tensor's address. No Python error is left behind.
bool address_of(PyObject* tensor, void** address);

}  // namespace isotile
