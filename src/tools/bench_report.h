// What `fourfold bench` prints and writes.
#pragma once

#include <string>
#include <vector>

#include "tools/bench.h"

namespace fourfold {

/// Lines about one machine's ceilings.
std::string format_machine(const MachineReport& machine);

/// Head of the table of cases.
std::string format_case_head();
/// A case: its line of the table, findings and stage times below it.
std::string format_case(const BenchResult& result);

/// Everything as JSON; docs/bench.md lists the keys.
std::string format_bench_json(const BenchRequest& request, const std::vector<MachineReport>& machines,
                              const std::vector<BenchResult>& results);

}  // namespace fourfold
