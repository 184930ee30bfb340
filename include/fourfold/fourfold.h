// fourfold's C interface: open a checkpoint, make one of its MoE layers on a backend, run it. C99 and newer.
//
//   fourfold_checkpoint* model = NULL;
//   fourfold_layer* layer = NULL;
//   fourfold_workspace* workspace = NULL;
//   fourfold_checkpoint_open("model", NULL, &model);
//   fourfold_layer_create(model, 3, NULL, &layer);
//   fourfold_workspace_create(layer, 512, NULL, 0, &workspace);
//   fourfold_forward_args args = {.size = sizeof args, .tokens = t, .x = x, ...};
//   if (fourfold_forward(layer, workspace, &args) != FOURFOLD_OK) puts(fourfold_last_error());
//
// Shapes: T tokens, H hidden, I intermediate, E experts, K experts of a token; row-major, [rows, columns].
//
// Status. Functions that can fail return one; their outputs are untouched unless it is FOURFOLD_OK. No C++
// exception leaves them. FOURFOLD_INVALID_ARGUMENT is returned for null where a pointer is needed,
// FOURFOLD_OUT_OF_MEMORY and FOURFOLD_INTERNAL by any of them; what else each returns stands beside it.
//
// Structs. The caller sets `size` to sizeof of the struct as its header has it. Later versions only append
// members: those that an older caller does not know count as zero, and a newer caller's, where an older
// library does not know them, must be zero (FOURFOLD_UNSUPPORTED). Zero always means the default.
//
// Handles. Each _close or _destroy takes null too. A layer does not need its checkpoint's handle any more,
// nor a workspace its layer's: they may be given back in any order.
//
// Threads. Any function may be called from any thread. A checkpoint, a router and a layer may be used by
// several at once; a workspace by one call at a time. A handle is given back when no other call uses it.
//
// Text is UTF-8, ends with a zero, and is never null. Options that are texts take what the command's options
// of that name take (docs/layertest.md); null and "" are the default.
#ifndef FOURFOLD_FOURFOLD_H_
#define FOURFOLD_FOURFOLD_H_

#include <stddef.h>
#include <stdint.h>

#include "fourfold/export.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- versions, status, errors ----

/// Of this header. Changes when a function or struct changes its meaning, not when something is added.
#define FOURFOLD_ABI_VERSION 1

/// Of the library that is loaded: compare with FOURFOLD_ABI_VERSION.
FOURFOLD_EXPORT int32_t fourfold_abi_version(void);

/// Of the library that is loaded, e.g. "0.1.0".
FOURFOLD_EXPORT const char* fourfold_version(void);

/// One of the numbers below; an int32_t, whose size does not depend on a compiler.
typedef int32_t fourfold_status;
enum {
  FOURFOLD_OK = 0,
  FOURFOLD_INVALID_ARGUMENT = 1,  ///< a shape, an option or a combination that the caller got wrong
  FOURFOLD_BAD_FILE = 2,          ///< a file's content is damaged, or not what its names promise
  FOURFOLD_NOT_FOUND = 3,         ///< a file, a tensor or a layer that is not there
  FOURFOLD_UNSUPPORTED = 4,       ///< valid, but this build, backend or version does not implement it
  FOURFOLD_IO = 5,                ///< the system refused to read
  FOURFOLD_DEVICE = 6,            ///< a GPU or its driver refused or failed
  FOURFOLD_OUT_OF_MEMORY = 7,
  FOURFOLD_INTERNAL = 8  ///< a mistake in fourfold itself
};

/// E.g. "invalid argument"; "unknown status" for a number that is none.
FOURFOLD_EXPORT const char* fourfold_status_text(fourfold_status status);

/// What went wrong in the last call of this thread that failed: the thing, what was expected, what was found.
/// "" where none has failed. The text lives until the next call of this thread that fails.
FOURFOLD_EXPORT const char* fourfold_last_error(void);

// ---- backends ----

typedef struct fourfold_backend_info {
  size_t size;
  const char* name;             ///< for fourfold_layer_options.backend, e.g. "cpu"
  const char* description;      ///< one line
  const char* why_unavailable;  ///< why this machine can't run it; "" where it can
  int32_t on_device;  ///< 1: pointers of its calls are device memory, and it has streams; 0: host, or it
                      ///< can't run
} fourfold_backend_info;

/// How many are compiled in, best first.
FOURFOLD_EXPORT int32_t fourfold_backend_count(void);

/// Of backend `index`, 0 to count - 1. Texts live as long as the library is loaded.
FOURFOLD_EXPORT fourfold_status fourfold_backend_describe(int32_t index, fourfold_backend_info* info);

// ---- checkpoints ----

/// An opened model directory.
typedef struct fourfold_checkpoint fourfold_checkpoint;

/// What the caller knows better than names, dtypes and config.json.
typedef struct fourfold_checkpoint_options {
  size_t size;
  const char* scheme;         ///< of four-bit weights: "modelopt", "compressed-tensors" or "mxfp4"
  const char* gate_up_order;  ///< in fused tensors: "gate-first", "up-first" or "interleaved"
  const char* activation;     ///< between the GEMMs, e.g. "swiglu,limit=10"
  const char* router;         ///< e.g. "sigmoid,top-k=8,scale=2.5"
  int32_t weight_on_input;  ///< 1: routing weights multiply an expert's input, also where the family says no
} fourfold_checkpoint_options;

/// Opens a model directory, or one .safetensors file. Files are mapped, not copied; they must not change
/// while in use. `options` may be null. FOURFOLD_NOT_FOUND: no such model; FOURFOLD_BAD_FILE: which file, and
/// why; FOURFOLD_IO.
FOURFOLD_EXPORT fourfold_status fourfold_checkpoint_open(const char* path,
                                                         const fourfold_checkpoint_options* options,
                                                         fourfold_checkpoint** checkpoint);
FOURFOLD_EXPORT void fourfold_checkpoint_close(fourfold_checkpoint* checkpoint);

/// Writes the numbers of the layers that hold experts, ascending, as many as `capacity` has room for; `count`
/// is how many there are. `layers` may be null where `capacity` is 0.
FOURFOLD_EXPORT fourfold_status fourfold_checkpoint_layers(const fourfold_checkpoint* checkpoint,
                                                           int64_t* layers, int64_t capacity, int64_t* count);

/// What a layer is.
typedef struct fourfold_layer_info {
  size_t size;
  int64_t hidden;               ///< H
  int64_t intermediate;         ///< I
  int64_t experts;              ///< E, of the model
  int64_t top_k;                ///< K, the router's; 0 where it is not known
  int64_t shared_intermediate;  ///< of the shared expert; 0: there is none
  int32_t gated;                ///< 1: experts have gate and up; 0: up alone
  int32_t weight_on_input;      ///< 1: routing weights multiply the experts' input
  const char* family;           ///< e.g. "qwen3-moe"
  const char* scheme;           ///< how the experts are stored, e.g. "nvfp4"
  const char* activation;       ///< e.g. "silu(g) * u"
  const char* router;           ///< e.g. "softmax, top-8, renormalised"; "" where the checkpoint has none
} fourfold_layer_info;

/// Texts live as long as the checkpoint's handle. FOURFOLD_NOT_FOUND: no such layer, or no experts in it;
/// FOURFOLD_BAD_FILE: a tensor is not as it should be; FOURFOLD_UNSUPPORTED or FOURFOLD_INVALID_ARGUMENT: the
/// family is not known, and the options name no activation.
FOURFOLD_EXPORT fourfold_status fourfold_checkpoint_layer(const fourfold_checkpoint* checkpoint,
                                                          int64_t layer, fourfold_layer_info* info);

// ---- routers: on the CPU, in host memory ----

/// A layer's router: which experts a token goes to.
typedef struct fourfold_router fourfold_router;

/// FOURFOLD_NOT_FOUND: the layer or its router's weight is not there; else as fourfold_checkpoint_layer.
FOURFOLD_EXPORT fourfold_status fourfold_router_create(const fourfold_checkpoint* checkpoint, int64_t layer,
                                                       fourfold_router** router);
FOURFOLD_EXPORT void fourfold_router_destroy(fourfold_router* router);

typedef struct fourfold_router_info {
  size_t size;
  int64_t hidden;      ///< H
  int64_t experts;     ///< E, of the model
  int64_t top_k;       ///< K
  int64_t vocabulary;  ///< token ids lie below it; 0: not routed by token id
} fourfold_router_info;

FOURFOLD_EXPORT fourfold_status fourfold_router_describe(const fourfold_router* router,
                                                         fourfold_router_info* info);

/// logits [T, E] = x [T, H] bf16 . weight^T + bias, float32. `tokens` is T, at least 0.
FOURFOLD_EXPORT fourfold_status fourfold_router_logits(const fourfold_router* router, const uint16_t* x,
                                                       int64_t tokens, float* logits);

/// From logits [T, E] to topk_ids [T, K], the model's expert numbers, best first, and topk_weights [T, K].
/// `token_ids` [T] for routers that go by token id; the others do not look at them, and null will do.
/// FOURFOLD_INVALID_ARGUMENT: token ids are missing, or beyond the vocabulary.
FOURFOLD_EXPORT fourfold_status fourfold_route(const fourfold_router* router, const float* logits,
                                               int64_t tokens, const int64_t* token_ids, int32_t* topk_ids,
                                               float* topk_weights);

// ---- layers ----

/// One MoE layer on one backend, with weights prepared for it.
typedef struct fourfold_layer fourfold_layer;

typedef struct fourfold_layer_options {
  size_t size;
  const char* backend;  ///< the only one to consider; default: the best that can run the layer, or what the
                        ///< environment variable FOURFOLD_BACKEND names
  const char* activations;  ///< staged as "nvfp4" (the default), "nvfp4x2", "fp8" or "bf16"
  /// Global scales of NVFP4 activations: "static", "max-over-experts", "dynamic-tensor" or "dynamic-token".
  /// Default: static where the checkpoint has input scales, else dynamic-token.
  const char* x_scale;
  const char* intermediate_scale;
  float x_max_scale;  ///< for max-over-experts, where experts are spread over ranks: the largest of all of
                      ///< them; 0: the largest here
  float intermediate_max_scale;
  const int64_t* experts;  ///< the model's numbers of those to hold, ascending; null: all
  int64_t expert_count;    ///< how many `experts` lists
  int32_t omit_shared;     ///< 1: without the shared expert, which another rank adds
  int64_t top_k;           ///< K; 0: the router's
  /// Block scales of nvfp4 activations: "amax" (the default), or on CPUs "four-over-six" or "mse".
  const char* activation_rule;
} fourfold_layer_options;

/// Makes `layer` of the checkpoint. `options` may be null. FOURFOLD_NOT_FOUND, FOURFOLD_BAD_FILE: as
/// fourfold_checkpoint_layer; FOURFOLD_INVALID_ARGUMENT: an option's name, scales that the checkpoint lacks,
/// no K known; FOURFOLD_UNSUPPORTED: no backend, or not the one that was named, can run it, and why for each;
/// FOURFOLD_IO: a file changed meanwhile; FOURFOLD_DEVICE.
FOURFOLD_EXPORT fourfold_status fourfold_layer_create(const fourfold_checkpoint* checkpoint, int64_t layer,
                                                      const fourfold_layer_options* options,
                                                      fourfold_layer** created);
FOURFOLD_EXPORT void fourfold_layer_destroy(fourfold_layer* layer);

/// What was made. Texts live as long as the layer's handle.
typedef struct fourfold_layer_description {
  size_t size;
  int64_t hidden;       ///< H
  int64_t experts;      ///< that it holds
  int64_t top_k;        ///< K
  int32_t on_device;    ///< 1: its pointers are device memory
  int32_t device;       ///< number of that device
  const char* backend;  ///< its name
  const char* reason;   ///< why this backend and none of the better ones
  const char* activations;
  const char *x_scale, *intermediate_scale;  ///< the policies; of formats other than NVFP4 not used
  const char* activation_rule;
} fourfold_layer_description;

FOURFOLD_EXPORT fourfold_status fourfold_layer_describe(const fourfold_layer* layer,
                                                        fourfold_layer_description* description);

// ---- running a layer ----

/// Scratch memory for one call at a time, and the frozen choice of kernels.
typedef struct fourfold_workspace fourfold_workspace;

/// A workspace's address is a multiple of so many bytes.
#define FOURFOLD_WORKSPACE_ALIGNMENT 256

/// How many bytes a workspace for up to `max_tokens` tokens takes. FOURFOLD_INVALID_ARGUMENT: max_tokens is
/// negative, or max_tokens * K is beyond 2^31 - 1.
FOURFOLD_EXPORT fourfold_status fourfold_workspace_bytes(const fourfold_layer* layer, int64_t max_tokens,
                                                         size_t* bytes);

/// Plans for up to `max_tokens` tokens. `memory` is `bytes` bytes where the backend computes, the caller's,
/// and outlives the workspace; null (with 0 bytes): the workspace allocates its own.
/// FOURFOLD_INVALID_ARGUMENT: as fourfold_workspace_bytes, too few bytes, or misaligned memory.
FOURFOLD_EXPORT fourfold_status fourfold_workspace_create(const fourfold_layer* layer, int64_t max_tokens,
                                                          void* memory, size_t bytes,
                                                          fourfold_workspace** workspace);
FOURFOLD_EXPORT void fourfold_workspace_destroy(fourfold_workspace* workspace);

/// Texts live as long as the workspace's handle.
typedef struct fourfold_workspace_info {
  size_t size;
  int64_t max_tokens;
  size_t bytes;
  const char* kernel;  ///< which will run
  const char* reason;  ///< why that one
} fourfold_workspace_info;

FOURFOLD_EXPORT fourfold_status fourfold_workspace_describe(const fourfold_workspace* workspace,
                                                            fourfold_workspace_info* info);

/// Bits of fourfold_forward_args.status.
enum {
  FOURFOLD_EXPERT_OUT_OF_RANGE = 1  ///< an id other than -1 that is no expert of the model: it counted as -1
};

/// Pointers lie where the backend computes: host memory for CPUs; for GPUs memory of the layer's device.
typedef struct fourfold_forward_args {
  size_t size;
  int64_t tokens;           ///< T, 0 to the workspace's max_tokens
  const uint16_t* x;        ///< [T, H] bf16
  int64_t x_stride;         ///< elements from one row to the next; 0: H
  const int32_t* topk_ids;  ///< [T, K], the model's expert numbers; -1, or of an expert that the layer does
                            ///< not hold: the slot adds nothing. Either these or topk_ids_i64
  const int64_t* topk_ids_i64;  ///< the same as int64_t
  const float* topk_weights;    ///< [T, K]
  uint16_t* y;                  ///< [T, H] bf16, written whole. Either this or y_f32
  float* y_f32;                 ///< the same as float32: partial sums that other ranks add to
  int64_t y_stride;             ///< elements from one row to the next; 0: H
  int32_t* status;  ///< one number to which bits as above are added, never taken away; may be null
  void* stream;     ///< cudaStream_t; null: the default stream. CPUs take null alone
} fourfold_forward_args;

/// y[t] = sum over k of topk_weights[t,k] * expert(topk_ids[t,k])(x[t]), and the shared expert's output. On a
/// GPU it only enqueues, and can be captured in a CUDA graph. `workspace` must have been made for `layer`.
/// FOURFOLD_INVALID_ARGUMENT: what does not fit, and then nothing was computed; FOURFOLD_DEVICE.
FOURFOLD_EXPORT fourfold_status fourfold_forward(const fourfold_layer* layer, fourfold_workspace* workspace,
                                                 const fourfold_forward_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* FOURFOLD_FOURFOLD_H_ */
