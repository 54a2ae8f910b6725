// Computing with the interpreter unlocked.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

namespace fastattn {

// Runs `work` with the interpreter unlocked. No destructor locks it again: at exit the interpreter ends waiting threads
// by unwinding them, which must not pass through one.
template <class Work>
void without_gil(Work work) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    work();
  } catch (const std::exception&) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) {
    std::rethrow_exception(error);
  }
}

}  // namespace fastattn
