#include "checkpoint/conversion_tasks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/fail.h"

namespace fourfold {
namespace {

/// Values that are converted at a time: 4 MB as float32.
constexpr int64_t kChunkValues = int64_t{1} << 20;

/// Rows as they are stored: codes, or bf16; and scales.
struct StoredRows {
  std::vector<std::byte> weight, scales;
};

int64_t rows_of_chunk(int64_t cols) {
  return std::max<int64_t>(1, kChunkValues / cols);
}

void require_finite(const std::string& name, int64_t row, const std::vector<float>& values) {
  if (std::all_of(values.begin(), values.end(), [](float value) { return std::isfinite(value); })) return;
  fail(ErrorCode::kBadFile,
       "{}: row {}: expected finite values, found NaN or infinity; look at it by inspect", name, row);
}

std::span<const std::byte> bytes_of(const std::vector<uint8_t>& values) {
  return std::as_bytes(std::span(values));
}

/// Appends rows of `view` from `first_row` of the whole matrix on.
void recode_rows(const WeightView& view, const Recoding& recoding, int64_t first_row, StoredRows& out) {
  const int64_t rows = rows_of(view), cols = cols_of(view);
  if (is_cast(view, recoding.to)) {
    const BlockScaledMatrix cast =
        cast_mxfp4_to_nvfp4(std::get<BlockScaledView>(view), recoding.kmax, nullptr);
    out.weight.assign(bytes_of(cast.codes).begin(), bytes_of(cast.codes).end());
    out.scales.assign(bytes_of(cast.scales).begin(), bytes_of(cast.scales).end());
    return;
  }
  const int block = block_of(recoding.to);
  const int64_t row_bytes = block == 0 ? 2 * cols : cols / 2, row_scales = block == 0 ? 0 : cols / block;
  out.weight.resize(static_cast<size_t>(rows * row_bytes));
  out.scales.resize(static_cast<size_t>(rows * row_scales));
  std::vector<float> values(static_cast<size_t>(cols));
  for (int64_t row = 0; row < rows; ++row) {
    dequantize_row(view, row, values.data());
    require_finite(recoding.name, first_row + row, values);
    std::byte* weight = out.weight.data() + row * row_bytes;
    auto* codes = reinterpret_cast<uint8_t*>(weight);
    auto* scales = reinterpret_cast<uint8_t*>(out.scales.data()) + row * row_scales;
    switch (recoding.to) {
      case TargetFormat::kNvfp4:
        quantize_weight_row_nvfp4(values, recoding.global, recoding.rule, codes, scales);
        break;
      case TargetFormat::kMxfp4:
        quantize_row_mxfp4(values, codes, scales);
        break;
      case TargetFormat::kBf16:
        for (size_t i = 0; i < values.size(); ++i) {
          const Bf16 value = encode_bf16(values[i]);
          if (!std::isfinite(static_cast<float>(value))) {
            fail(ErrorCode::kBadFile, "'{}', row {}: expected values that bf16 can hold, found {}",
                 recoding.name, first_row + row, values[i]);
          }
          std::memcpy(weight + i * sizeof(value), &value, sizeof(value));
        }
        break;
    }
  }
}

/// Calls `done(first_row, stored)` for each chunk of rows.
void recode_matrix(const WeightView& view, const Recoding& recoding,
                   const std::function<void(int64_t, const StoredRows&)>& done) {
  StoredRows stored;
  const int64_t step = rows_of_chunk(cols_of(view));
  for (int64_t row = 0; row < rows_of(view); row += step) {
    const int64_t count = std::min(step, rows_of(view) - row);
    const auto* fp8 = std::get_if<Fp8View>(&view);
    // Tiles of FP8 are not cut: all of it, whose memory FusedSource and SourceMatrix count.
    recode_rows(fp8 ? view : take_rows(view, row, count, 1), recoding, row, stored);
    done(row, stored);
    if (fp8) return;
  }
}

void write_matrix(const SourceMatrix& matrix, const Recoding& recoding, const LinearNames& names,
                  const WritePart& write) {
  const std::string weight = matrix.name + std::string(names.weight);
  const std::string scales = matrix.name + std::string(names.scales);
  const int64_t rows = rows_of(matrix.view), cols = cols_of(matrix.view);
  const std::vector<TensorSpec> specs = matrix_specs(matrix.name, recoding.to, names, rows, cols);
  recode_matrix(matrix.view, recoding, [&](int64_t row, const StoredRows& stored) {
    write(weight, row * (specs[0].bytes() / rows), stored.weight);
    if (specs.size() > 1) write(scales, row * (specs[1].bytes() / rows), stored.scales);
  });
  if (names.global.empty()) return;
  const float global = names.divides ? 1.0f / recoding.global : recoding.global;
  write(matrix.name + std::string(names.global), 0, std::as_bytes(std::span(&global, 1)));
}

/// Bytes of a chunk in all its forms; FP8 matrices are one chunk.
int64_t chunk_bytes(const WeightView& view) {
  const int64_t cols = cols_of(view);
  const int64_t rows = std::holds_alternative<Fp8View>(view) ? rows_of(view) : rows_of_chunk(cols);
  return std::min(rows, rows_of(view)) * cols * 3 + cols * 4;
}

/// The part of the fused tensor at `scale` bytes an expert, transposed where the layout is.
void write_fused(const std::string& tensor, const std::vector<std::byte>& part, int64_t rows, int64_t size,
                 bool is_transposed, int64_t expert, const WritePart& write) {
  const auto bytes = static_cast<int64_t>(part.size());
  if (!is_transposed) return write(tensor, expert * bytes, part);
  std::vector<std::byte> turned(part.size());
  transpose(part.data(), rows, bytes / rows / size, size, turned.data());
  write(tensor, expert * bytes, turned);
}

}  // namespace

bool is_cast(const WeightView& view, TargetFormat to) {
  return to == TargetFormat::kNvfp4 && is_stored_as(view, QuantFormat::kMxfp4);
}

float cast_global_scale(int kmax) {
  return kmax == kNoExponent ? 1.0f : std::ldexp(1.0f, kmax - 8);
}

float finite_absolute_maximum(const WeightView& view, const std::string& name) {
  std::vector<float> values(static_cast<size_t>(cols_of(view)));
  float amax = 0.0f;
  for (int64_t row = 0; row < rows_of(view); ++row) {
    dequantize_row(view, row, values.data());
    require_finite(name, row, values);
    amax = std::max(amax, absolute_maximum({values.data(), 1, cols_of(view)}));
  }
  return amax;
}

WriteTask separate_task(std::vector<SourceMatrix> matrices, TargetFormat to, const LinearNames& names,
                        ScaleRule rule, int kmax) {
  WriteTask task;
  task.first_tensor = matrices.front().name + std::string(names.weight);
  for (const SourceMatrix& matrix : matrices) {
    task.reads.insert(task.reads.end(), matrix.reads.begin(), matrix.reads.end());
    task.scratch_bytes = std::max(task.scratch_bytes, chunk_bytes(matrix.view));
  }
  task.run = [matrices = std::move(matrices), to, names, rule, kmax](const WritePart& write) {
    Recoding recoding{to, rule, 1.0f, kmax, ""};
    if (is_cast(matrices.front().view, to)) {
      recoding.global = cast_global_scale(kmax);
    } else if (to == TargetFormat::kNvfp4) {
      float amax = 0.0f;
      for (const SourceMatrix& matrix : matrices) {
        amax = std::max(amax, finite_absolute_maximum(matrix.view, matrix.name));
      }
      recoding.global = nvfp4_global_scale(amax);
    }
    for (const SourceMatrix& matrix : matrices) {
      recoding.name = matrix.name;
      write_matrix(matrix, recoding, names, write);
    }
  };
  return task;
}

WriteTask fused_task(FusedSource source, const std::string& name, ExpertLayout layout,
                     const Recoding& recoding) {
  const LinearNames names = fused_names(recoding.to);
  WriteTask task;
  task.first_tensor = name + std::string(names.weight);
  task.reads = source.reads;
  task.scratch_bytes =
      source.rows * source.cols * 8;  // repacked, stored and transposed; at most 2 bytes each
  task.run = [source = std::move(source), name, names, layout, recoding](const WritePart& write) {
    RepackedBytes repacked;
    const WeightView view = source.reader->matrix(source.expert, source.is_transposed, repacked);
    StoredRows all;
    recode_matrix(view, recoding, [&](int64_t, const StoredRows& stored) {
      all.weight.insert(all.weight.end(), stored.weight.begin(), stored.weight.end());
      all.scales.insert(all.scales.end(), stored.scales.begin(), stored.scales.end());
    });
    const bool turns = layout == ExpertLayout::kFusedTransposed;
    const int64_t size = recoding.to == TargetFormat::kBf16 ? 2 : 1;
    write_fused(name + std::string(names.weight), all.weight, source.rows, size, turns, source.expert, write);
    if (names.scales.empty()) return;
    write_fused(name + std::string(names.scales), all.scales, source.rows, 1, turns, source.expert, write);
  };
  return task;
}

}  // namespace fourfold
