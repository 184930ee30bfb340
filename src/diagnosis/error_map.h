// Where in an output the error sits: tokens, experts, columns, blocks, a period.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "diagnosis/subject.h"

namespace fourfold::diagnosis {

struct ErrorMap {
  int64_t elements = 0, not_finite = 0;
  std::vector<int64_t> bad_tokens;   ///< further off than the limit
  std::vector<int64_t> bad_experts;  ///< every token that goes there is bad, and some other token is not
  std::vector<int64_t> not_finite_tokens;
  double share_of_worst_columns = 0.0;  ///< of the squared error, in the worst tenth of the columns
  int64_t first_bad_column = -1,
          last_bad_column = -1;  ///< where nine tenths of the error lie within half the columns
  int64_t period = 0;            ///< of the error along columns; 0: none stands out
  int64_t block = 0;             ///< columns of aligned blocks, few of which hold the error; 0: it is spread
  std::vector<int64_t> bad_blocks;
};

/// Compares `found` with `due`, both [tokens.size(), H], of the named tokens.
ErrorMap map_errors(const Subject& subject, const std::vector<int64_t>& tokens,
                    const std::vector<float>& found, const std::vector<float>& due, double limit);

/// A line for each thing that stands out.
std::vector<std::string> describe(const ErrorMap& map, int64_t tokens);

}  // namespace fourfold::diagnosis
