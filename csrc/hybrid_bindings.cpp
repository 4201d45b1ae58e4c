#include "hybrid_bindings.h"

#include <pybind11/stl.h>

#include <cstring>
#include <memory>

#include "cuda_host.h"
#include "expert_queue.h"
#include "sim_stream.h"
#include "step_bindings.h"

namespace kt {
namespace {

// A call, and everything it points into.
struct BoundCall {
  ~BoundCall() {
    py::gil_scoped_release release;
    queue->withdraw(call);
  }

  std::shared_ptr<ExpertQueue> queue;
  std::vector<py::object> kept;
  ExpertCall call;
  int capacity;
};

std::unique_ptr<BoundCall> make_call(std::shared_ptr<ExpertQueue> queue, py::object layer, const py::array& x,
                                     const py::array& ids, const py::array& weights, py::array out) {
  ExpertLayer& experts = layer.cast<LayerOverBlobs&>().layer;
  const bool bf16 = is_bf16(x, "x");
  check_contiguous(x, "x", 2);
  const int rows = checked_int(x.shape(0), "rows");
  if (x.shape(1) != experts.hidden_size()) fail("x has shape " + shape_text(x));
  if (ids.ndim() != 2) fail("ids must have 2 dimensions, got " + shape_text(ids));
  const int k = checked_int(ids.shape(1), "k");
  if (k > 1024) fail("ids must have 1 to 1024 columns, got " + std::to_string(k));
  const ExpertCall call = {queue.get(),
                           &experts,
                           x.data(),
                           bf16,
                           read<int64_t>(ids, "ids", {rows, k}),
                           read<float>(weights, "weights", {rows, k}),
                           write<float>(out, "out", {rows, experts.hidden_size()}),
                           rows,
                           k};
  return std::unique_ptr<BoundCall>(new BoundCall{std::move(queue), {layer, x, ids, weights, out}, call, rows});
}

void set_rows(BoundCall& self, int rows) {
  if (rows < 1 || rows > self.capacity)
    fail("rows must be 1 to " + std::to_string(self.capacity) + ", got " + std::to_string(rows));
  self.call.rows = rows;
}

uintptr_t address_of(BoundCall& self) { return reinterpret_cast<uintptr_t>(&self.call); }

py::dict stats_of(ExpertQueue& queue) {
  const ExpertQueue::Stats stats = queue.stats();
  py::dict result;
  result["calls"] = stats.calls;
  result["busy_s"] = stats.busy_s;
  result["waited_s"] = stats.waited_s;
  return result;
}

SimStream::HostFunction function_at(uintptr_t address) {
  if (address == 0) fail("a host function's address is 0");
  return reinterpret_cast<SimStream::HostFunction>(address);
}

// A Python object that may be let go of on any thread.
std::shared_ptr<py::object> held(py::object object) {
  return std::shared_ptr<py::object>(new py::object(std::move(object)), [](py::object* last) {
    py::gil_scoped_acquire acquire;
    delete last;
  });
}

void sim_compute(SimStream& stream, py::function work) {
  const std::shared_ptr<py::object> function = held(std::move(work));
  stream.compute([function] {
    py::gil_scoped_acquire acquire;
    (*function)();
  });
}

void sim_copy(SimStream& stream, py::array to, const py::array& from) {
  if (to.nbytes() != from.nbytes()) fail("to and from differ in bytes");
  check_contiguous(to, "to", static_cast<int>(to.ndim()));
  check_contiguous(from, "from", static_cast<int>(from.ndim()));
  if (!to.writeable()) fail("to must be writeable");
  const auto bytes = static_cast<size_t>(from.nbytes());
  void* target = to.mutable_data();
  const void* source = from.data();
  const std::shared_ptr<py::object> kept = held(py::make_tuple(to, from));
  stream.compute([kept, target, source, bytes] { std::memcpy(target, source, bytes); });
}

// Streams and queues join their threads, which may need the GIL for what they still run.
template <typename T>
std::shared_ptr<T> joined_without_gil(T* made) {
  return std::shared_ptr<T>(made, [](T* value) {
    py::gil_scoped_release release;
    delete value;
  });
}

}  // namespace

void bind_hybrid(py::module_& m) {
  m.attr("SUBMIT_CALL") = reinterpret_cast<uintptr_t>(&kt_submit_call);
  m.attr("SYNC_CALL") = reinterpret_cast<uintptr_t>(&kt_sync_call);
  m.def("loaded_cudart", &loaded_cudart);
  m.def(
      "launch_host_function",
      [](uintptr_t stream, uintptr_t function, uintptr_t argument) {
        launch_host_function(reinterpret_cast<void*>(stream), function_at(function), reinterpret_cast<void*>(argument));
      },
      py::arg("stream"), py::arg("function"), py::arg("argument"));

  py::class_<ExpertQueue, std::shared_ptr<ExpertQueue>>(m, "ExpertQueue")
      .def(py::init([](double timeout_s) { return joined_without_gil(new ExpertQueue(timeout_s)); }),
           py::arg("timeout_s"))
      .def("wait_idle", &ExpertQueue::wait_idle, py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("take_error", &ExpertQueue::take_error)
      .def("inject", &ExpertQueue::inject, py::arg("delay_s") = 0.0, py::arg("error") = "", py::arg("skipped") = 0)
      .def_property_readonly("stats", &stats_of);

  py::class_<BoundCall>(m, "ExpertCall")
      .def(py::init(&make_call), py::arg("queue"), py::arg("layer"), py::arg("x"), py::arg("ids"), py::arg("weights"),
           py::arg("out"))
      .def_property_readonly("address", &address_of)
      .def_property_readonly("rows", [](const BoundCall& self) { return self.call.rows; })
      .def("set_rows", &set_rows, py::arg("rows"))
      .def(
          "submit", [](BoundCall& self) { kt_submit_call(&self.call); }, py::call_guard<py::gil_scoped_release>())
      .def("sync", [](BoundCall& self) { kt_sync_call(&self.call); }, py::call_guard<py::gil_scoped_release>());

  py::class_<SimEvent, std::shared_ptr<SimEvent>>(m, "SimEvent")
      .def(py::init<>())
      .def("hold", &SimEvent::hold, py::arg("seconds"), py::call_guard<py::gil_scoped_release>());
  py::class_<SimStream, std::shared_ptr<SimStream>>(m, "SimStream")
      .def(py::init([] { return joined_without_gil(new SimStream()); }))
      .def("copy", &sim_copy, py::arg("to"), py::arg("source"))
      .def(
          "host",
          [](SimStream& stream, uintptr_t function, uintptr_t argument) {
            stream.host(function_at(function), reinterpret_cast<void*>(argument));
          },
          py::arg("function"), py::arg("argument"))
      .def("compute", &sim_compute, py::arg("work"))
      .def("record", &SimStream::record, py::arg("event"))
      .def("wait", &SimStream::wait, py::arg("event"))
      .def("synchronize", &SimStream::synchronize, py::arg("seconds"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace kt
