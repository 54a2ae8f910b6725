// Computing with the interpreter unlocked.
#pragma once

#include <pthread.h>
#include <pybind11/pybind11.h>

#include <exception>

#include "parallel.h"

namespace fastattn {

// The thread whose business signals are; in a forked child, the one that forked.
inline unsigned long g_main_thread = 0;

inline void watch_main_thread() {
  namespace py = pybind11;
  g_main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  pthread_atfork(nullptr, nullptr, [] { g_main_thread = PyThread_get_thread_ident(); });
}

// Lets Python's signal handlers run; true if one raised, as that of Ctrl-C does.
inline bool signal_raised(void* opaque) {
  PyThreadState*& state = *static_cast<PyThreadState**>(opaque);
  PyEval_RestoreThread(state);
  const bool raised = PyErr_CheckSignals() != 0;
  state = PyEval_SaveThread();
  return raised;
}

// Runs `work` with the interpreter unlocked. No destructor locks it again: at exit the interpreter ends waiting threads
// by unwinding them, which must not pass through one. Nor may it pass through a loop: only the main thread, which is
// never ended so, stops to look for signals.
template <class Work>
void without_gil(Work work) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr error;
  bool raised = false;
  try {
    if (PyThread_get_thread_ident() == g_main_thread) {
      const Interruptible interruptible(signal_raised, static_cast<void*>(&state));
      work();
      raised = interruptible.stopped();
    } else {
      work();
    }
  } catch (const std::exception&) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (raised) {
    throw pybind11::error_already_set();
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

// Runs `work` with the interpreter unlocked, and gives `result` back. A thread that ends with the interpreter is
// unwound from within, without its lock: nothing may then let go of an array, so no destructor holds one.
template <class Work>
pybind11::object keeping(pybind11::object&& result, Work work) {
  PyObject* const kept = result.release().ptr();
  try {
    without_gil(work);
  } catch (const std::exception&) {
    Py_DECREF(kept);
    throw;
  }
  return pybind11::reinterpret_steal<pybind11::object>(kept);
}

}  // namespace fastattn
