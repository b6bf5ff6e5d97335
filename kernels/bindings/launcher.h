// A launcher as a Python function: f((device, stream), field=value, ...), with every field of its params struct by name.
// Fields that several calls share may come as dictionaries after the first argument.
//
// CPython's vectorcall hands over the names as interned strings, so that a call which gives the fields in their order costs
// one comparison of pointers per field; pybind11's own keyword arguments make a dictionary per call.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

#include "status.h"

namespace moe {

struct Field {
  enum class Kind { kPointer, kInt32, kInt64, kFloat, kDouble, kBool };
  std::string name;
  Kind kind;
  const void* at;  // in the struct that `fields` was called with
};
using Fields = std::vector<Field>;

inline Fields concat(std::initializer_list<Fields> parts) {
  Fields all;
  for (const Fields& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// One field; of a struct in a struct, its own fields: `fields(const Struct&)`.
template <class T>
Fields field(const char* name, const T& member) {
  using Kind = Field::Kind;
  if constexpr (std::is_class_v<T>) return fields(member);
  else if constexpr (std::is_pointer_v<T>) return {{name, Kind::kPointer, &member}};
  else if constexpr (std::is_same_v<T, bool>) return {{name, Kind::kBool, &member}};
  else if constexpr (std::is_same_v<T, float>) return {{name, Kind::kFloat, &member}};
  else if constexpr (std::is_same_v<T, double>) return {{name, Kind::kDouble, &member}};
  else return {{name, sizeof(T) == 8 ? Kind::kInt64 : Kind::kInt32, &member}};
}

// MOE_FIELDS(Params, a, b, ...) defines fields(const Params&): its members, in the order in which calls give them.
#define MOE_FIELDS(Params, ...) \
  inline Fields fields(const Params& p) { return concat({MOE_EXPAND(MOE_EACH(__VA_ARGS__))}); }
#define MOE_EACH(member, ...) field(#member, p.member), __VA_OPT__(MOE_NEXT MOE_PARENS(__VA_ARGS__))
#define MOE_NEXT() MOE_EACH
#define MOE_PARENS ()
#define MOE_EXPAND(...) MOE_EXPAND1(MOE_EXPAND1(MOE_EXPAND1(__VA_ARGS__)))  // scans again: once per member
#define MOE_EXPAND1(...) MOE_EXPAND2(MOE_EXPAND2(MOE_EXPAND2(__VA_ARGS__)))
#define MOE_EXPAND2(...) MOE_EXPAND3(MOE_EXPAND3(MOE_EXPAND3(__VA_ARGS__)))
#define MOE_EXPAND3(...) __VA_ARGS__

namespace bindings {

namespace py = pybind11;

// The fields of one launcher's params, by offset.
class Signature {
 public:
  Signature(const char* launcher, const void* params, const Fields& fields) : launcher_(launcher), help_(launcher) {
    help_ += "((device, stream)";
    for (const Field& f : fields) {
      const auto offset = static_cast<const char*>(f.at) - static_cast<const char*>(params);
      slots_.push_back({PyUnicode_InternFromString(f.name.c_str()), f.name, f.kind, size_t(offset)});
      help_ += ", " + f.name + "=";
    }
    help_ += ")";
  }

  const char* help() const { return help_.c_str(); }

  struct Place {
    int device;
    void* stream;
  };

  // From the arguments of a vectorcall; false with a Python error set.
  bool read(PyObject* const* args, Py_ssize_t positional, PyObject* names, Place& place, void* params) const {
    const char* const usage = "arguments are (device, stream), then fields by name: ";
    if (positional < 1 || !PyTuple_Check(args[0]) || PyTuple_GET_SIZE(args[0]) != 2) return type_error(usage + help_);
    place = {int(PyLong_AsLong(PyTuple_GET_ITEM(args[0], 0))), PyLong_AsVoidPtr(PyTuple_GET_ITEM(args[0], 1))};
    if (PyErr_Occurred() != nullptr) return false;
    uint64_t given = 0;  // a bit per field
    size_t next = 0;     // the field that a call in order gives next
    const auto give = [&](PyObject* name, PyObject* value) {
      const Slot* const slot = find(name, next);
      if (slot == nullptr) {
        PyErr_Format(PyExc_TypeError, "kernels.%s: no field %S, fields are %s", launcher_, name, help());
        return false;
      }
      const size_t index = size_t(slot - slots_.data());
      if (given >> index & 1) return type_error(slot->name + " must be given once: " + help_);
      given |= uint64_t(1) << index;
      next = index + 1;
      return set(*slot, value, static_cast<char*>(params) + slot->offset);
    };
    for (Py_ssize_t i = 1; i < positional; ++i) {
      if (!PyDict_Check(args[i])) return type_error(usage + help_);
      PyObject *name, *value;
      for (Py_ssize_t at = 0; PyDict_Next(args[i], &at, &name, &value) != 0;) {
        if (!give(name, value)) return false;
      }
    }
    const Py_ssize_t named = names == nullptr ? 0 : PyTuple_GET_SIZE(names);
    for (Py_ssize_t i = 0; i < named; ++i) {
      if (!give(PyTuple_GET_ITEM(names, i), args[positional + i])) return false;
    }
    return given == (uint64_t(1) << slots_.size()) - 1 || type_error("every field must be given: " + help_);
  }

  // "kernels.select_forward: num_experts must be in [1, 1024], got tokens=4, experts=2000, top_k=2, dtype=1"
  std::string refusal(Status status, const void* params) const {
    std::string text = std::string("kernels.") + launcher_ + ": " + rule(status.code) + ", got";
    const char* separator = " ";
    for (const Slot& slot : slots_) {
      const char* const at = static_cast<const char*>(params) + slot.offset;
      if (slot.kind != Field::Kind::kInt32 && slot.kind != Field::Kind::kInt64) continue;
      const bool wide = slot.kind == Field::Kind::kInt64;
      const int64_t value = wide ? *reinterpret_cast<const int64_t*>(at) : *reinterpret_cast<const int32_t*>(at);
      text += separator + slot.name + "=" + std::to_string(value);
      separator = ", ";
    }
    return text;
  }

 private:
  struct Slot {
    PyObject* interned;
    std::string name;
    Field::Kind kind;
    size_t offset;
  };

  bool type_error(const std::string& text) const {
    PyErr_SetString(PyExc_TypeError, (std::string("kernels.") + launcher_ + ": " + text).c_str());
    return false;
  }

  const Slot* find(PyObject* name, size_t expected) const {
    if (expected < slots_.size() && slots_[expected].interned == name) return &slots_[expected];
    for (const Slot& slot : slots_) {
      if (slot.interned == name) return &slot;
    }
    for (const Slot& slot : slots_) {
      if (PyUnicode_Check(name) && PyUnicode_Compare(slot.interned, name) == 0) return &slot;
    }
    return nullptr;
  }

  bool set(const Slot& slot, PyObject* value, char* at) const {
    switch (slot.kind) {
      case Field::Kind::kFloat: *reinterpret_cast<float*>(at) = float(PyFloat_AsDouble(value)); break;
      case Field::Kind::kDouble: *reinterpret_cast<double*>(at) = PyFloat_AsDouble(value); break;
      case Field::Kind::kBool: *reinterpret_cast<bool*>(at) = PyObject_IsTrue(value) == 1; break;
      case Field::Kind::kPointer: *reinterpret_cast<void**>(at) = PyLong_AsVoidPtr(value); break;
      case Field::Kind::kInt64: *reinterpret_cast<int64_t*>(at) = PyLong_AsLongLong(value); break;
      case Field::Kind::kInt32: {
        const int64_t wide = PyLong_AsLongLong(value);
        if (wide < INT32_MIN || wide > INT32_MAX) return type_error(slot.name + " must fit in 32 bits");
        *reinterpret_cast<int32_t*>(at) = int32_t(wide);
      }
    }
    return PyErr_Occurred() == nullptr;
  }

  const char* launcher_;
  std::string help_;
  std::vector<Slot> slots_;
};

template <class Params>
Params params_of(Status (*)(const Params&, Stream));

// A backend guards the device and explains a CUDA error.
template <class Backend, auto kLauncher>
class Function {
 public:
  static void define(py::module_& m, const char* name) {
    static const Params params{};
    signature_ = new Signature(name, &params, fields(params));  // for as long as the module, which is never unloaded
    static PyMethodDef method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call)),
                              METH_FASTCALL | METH_KEYWORDS, signature_->help()};
    m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, m.attr("__name__").ptr()));
  }

 private:
  using Params = decltype(params_of(kLauncher));

  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t positional, PyObject* names) {
    Params params{};
    Signature::Place place;
    if (!signature_->read(args, positional, names, place, &params)) return nullptr;
    Status status;
    {
      const py::gil_scoped_release unlocked;
      const typename Backend::Guard guard(place.device);
      status = kLauncher(params, place.stream);
    }
    if (status.ok()) Py_RETURN_NONE;
    const std::string text = signature_->refusal(status, &params);
    if (status.code != Code::kCuda) PyErr_SetString(PyExc_ValueError, text.c_str());
    else PyErr_SetString(PyExc_RuntimeError, (text + ": " + Backend::explain(status.cuda_error)).c_str());
    return nullptr;
  }

  static inline const Signature* signature_ = nullptr;
};

template <class Backend, auto kLauncher>
void define(py::module_& m, const char* name) {
  Function<Backend, kLauncher>::define(m, name);
}

}  // namespace bindings
}  // namespace moe
