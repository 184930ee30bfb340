/* The C interface from C99: values are the C++ interface's bit for bit, and every way to call it wrongly is a
 * status and a text that names what is wrong. usage: c_api_test DIR, where it makes a model. */
#include <fourfold/fourfold.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "c_api_expected.h"

#define COUNT_OF(array) ((int64_t)(sizeof(array) / sizeof(array)[0]))

enum { kTokens = 5, kHidden = 128, kExperts = 8, kTopK = 2 };

static int failures = 0;

#define CHECK(condition) check((condition) != 0, #condition, __LINE__)
#define CHECK_OK(call) check_status((call), FOURFOLD_OK, "", #call, __LINE__)
/* `call` fails with this status and a text that has `words` in it. */
#define CHECK_FAILS(call, status, words) check_status((call), (status), (words), #call, __LINE__)

static void check(int holds, const char* what, int line) {
  if (holds) return;
  ++failures;
  fprintf(stderr, "c_api_test.c:%d: does not hold: %s\n", line, what);
}

static void check_status(fourfold_status found, fourfold_status expected, const char* words, const char* what,
                         int line) {
  if (found == expected && (found == FOURFOLD_OK || strstr(fourfold_last_error(), words) != NULL)) return;
  ++failures;
  fprintf(stderr, "c_api_test.c:%d: %s: expected '%s' with \"%s\", found '%s': %s\n", line, what,
          fourfold_status_text(expected), words, fourfold_status_text(found), fourfold_last_error());
}

static char model_path[4096];
static uint16_t x[kTokens * kHidden];
static const float kWeights[kTokens * kTopK] = {0.75f, 0.25f, 1.0f,   -0.5f, 0.5f,
                                                0.5f,  2.0f,  0.125f, 0.3f,  0.7f};
static const int32_t kIds[kTokens * kTopK] = {0, 7, 3, 3, -1, 2, -1, -1, 5, 6};

/* Ordinary bf16 numbers of both signs, 0.25 to 3.98, by a linear congruential generator. */
static void fill_x(void) {
  uint32_t state = 1;
  for (int i = 0; i < kTokens * kHidden; ++i) {
    state = state * 1664525u + 1013904223u;
    x[i] = (uint16_t)((state >> 31 << 15) | (0x3E80u + (state >> 16) % 0x200u));
  }
}

static fourfold_forward_args arguments(uint16_t* y) {
  fourfold_forward_args args = {.size = sizeof args, .tokens = kTokens, .x = x, .y = y};
  args.topk_ids = kIds;
  args.topk_weights = kWeights;
  return args;
}

static void test_versions(void) {
  CHECK(fourfold_abi_version() == FOURFOLD_ABI_VERSION);
  CHECK(strcmp(fourfold_version(), FOURFOLD_VERSION) == 0);
  CHECK(strcmp(fourfold_last_error(), "") == 0); /* it is the first test */
  for (fourfold_status status = FOURFOLD_OK; status <= FOURFOLD_INTERNAL; ++status) {
    CHECK(strcmp(fourfold_status_text(status), "unknown status") != 0);
  }
  CHECK(strcmp(fourfold_status_text(FOURFOLD_INTERNAL + 1), "unknown status") == 0);
  CHECK(strcmp(fourfold_status_text(-1), "unknown status") == 0);
}

static void test_backends(void) {
  const int32_t count = fourfold_backend_count();
  fourfold_backend_info info = {.size = sizeof info};
  CHECK(count >= 2);
  CHECK_OK(fourfold_backend_describe(count - 1, &info));
  CHECK(strcmp(info.name, "reference") == 0 && info.why_unavailable[0] == '\0' && info.on_device == 0);
  CHECK_OK(fourfold_backend_describe(count - 2, &info));
  CHECK(strcmp(info.name, "cpu") == 0 && info.description[0] != '\0');
  CHECK_FAILS(fourfold_backend_describe(count, &info), FOURFOLD_INVALID_ARGUMENT, "backend index");
  CHECK_FAILS(fourfold_backend_describe(-1, &info), FOURFOLD_INVALID_ARGUMENT, "backend index");
  CHECK_FAILS(fourfold_backend_describe(0, NULL), FOURFOLD_INVALID_ARGUMENT, "fourfold_backend_info");
}

static void test_opening(void) {
  fourfold_checkpoint* checkpoint = NULL;
  fourfold_checkpoint_options options = {.size = sizeof options, .scheme = "nvfp5"};
  CHECK_FAILS(fourfold_checkpoint_open(NULL, NULL, &checkpoint), FOURFOLD_INVALID_ARGUMENT, "path");
  CHECK_FAILS(fourfold_checkpoint_open(model_path, NULL, NULL), FOURFOLD_INVALID_ARGUMENT, "checkpoint");
  CHECK_FAILS(fourfold_checkpoint_open("/nowhere/at/all", NULL, &checkpoint), FOURFOLD_NOT_FOUND,
              "/nowhere/at/all");
  CHECK_FAILS(fourfold_checkpoint_open(model_path, &options, &checkpoint), FOURFOLD_INVALID_ARGUMENT,
              "'nvfp5'");
  options.scheme = NULL;
  options.gate_up_order = "sideways";
  CHECK_FAILS(fourfold_checkpoint_open(model_path, &options, &checkpoint), FOURFOLD_INVALID_ARGUMENT,
              "'sideways'");
  options.gate_up_order = NULL;
  options.activation = "tanh";
  CHECK_FAILS(fourfold_checkpoint_open(model_path, &options, &checkpoint), FOURFOLD_INVALID_ARGUMENT, "tanh");
  options.activation = NULL;
  options.router = "roulette";
  CHECK_FAILS(fourfold_checkpoint_open(model_path, &options, &checkpoint), FOURFOLD_INVALID_ARGUMENT,
              "roulette");
  options.router = NULL;
  options.size = 0;
  CHECK_FAILS(fourfold_checkpoint_open(model_path, &options, &checkpoint), FOURFOLD_INVALID_ARGUMENT, "size");
  CHECK(checkpoint == NULL); /* outputs are untouched */

  /* What a caller says reaches the reader: global scales that divide are other scales. */
  fourfold_layer* layer = NULL;
  options.size = sizeof options;
  options.scheme = "mxfp4";
  CHECK_OK(fourfold_checkpoint_open(model_path, &options, &checkpoint));
  CHECK_FAILS(fourfold_layer_create(checkpoint, 0, NULL, &layer), FOURFOLD_BAD_FILE, "expected");
  fourfold_checkpoint_close(checkpoint);
  fourfold_checkpoint_close(NULL);
}

static void test_checkpoint(const fourfold_checkpoint* checkpoint) {
  int64_t layers[3] = {-1, -1, -1}, count = 0;
  CHECK_OK(fourfold_checkpoint_layers(checkpoint, NULL, 0, &count));
  CHECK(count == 2);
  CHECK_OK(fourfold_checkpoint_layers(checkpoint, layers, 1, &count));
  CHECK(count == 2 && layers[0] == 0 && layers[1] == -1);
  CHECK_OK(fourfold_checkpoint_layers(checkpoint, layers, COUNT_OF(layers), &count));
  CHECK(count == 2 && layers[0] == 0 && layers[1] == 1 && layers[2] == -1);
  CHECK_FAILS(fourfold_checkpoint_layers(NULL, layers, 1, &count), FOURFOLD_INVALID_ARGUMENT, "checkpoint");
  CHECK_FAILS(fourfold_checkpoint_layers(checkpoint, NULL, 1, &count), FOURFOLD_INVALID_ARGUMENT, "layers");
  CHECK_FAILS(fourfold_checkpoint_layers(checkpoint, layers, -1, &count), FOURFOLD_INVALID_ARGUMENT,
              "capacity");
  CHECK_FAILS(fourfold_checkpoint_layers(checkpoint, layers, 1, NULL), FOURFOLD_INVALID_ARGUMENT, "count");

  fourfold_layer_info info = {.size = sizeof info};
  CHECK_OK(fourfold_checkpoint_layer(checkpoint, 1, &info));
  CHECK(info.hidden == kHidden && info.intermediate == 64 && info.experts == kExperts && info.top_k == kTopK);
  CHECK(info.shared_intermediate > 0 && info.gated == 1 && info.weight_on_input == 0);
  CHECK(strcmp(info.family, "deepseek-v4") == 0 && strcmp(info.scheme, "nvfp4") == 0);
  CHECK(strstr(info.activation, "silu") != NULL && strstr(info.router, "top-2") != NULL);
  CHECK_FAILS(fourfold_checkpoint_layer(checkpoint, 9, &info), FOURFOLD_NOT_FOUND, "9");
  CHECK_FAILS(fourfold_checkpoint_layer(checkpoint, -1, &info), FOURFOLD_NOT_FOUND, "-1");
  CHECK_FAILS(fourfold_checkpoint_layer(NULL, 0, &info), FOURFOLD_INVALID_ARGUMENT, "checkpoint");
  CHECK_FAILS(fourfold_checkpoint_layer(checkpoint, 0, NULL), FOURFOLD_INVALID_ARGUMENT,
              "fourfold_layer_info");
}

/* Structs of other versions: an older caller's is shorter, a newer caller's longer. */
static void test_struct_sizes(const fourfold_checkpoint* checkpoint) {
  struct {
    fourfold_layer_info known;
    int64_t added;
  } newer = {{.size = sizeof newer}, 7};
  CHECK_OK(fourfold_checkpoint_layer(checkpoint, 0, &newer.known));
  CHECK(newer.known.hidden == kHidden && newer.added == 0 && newer.known.size == sizeof newer);

  fourfold_layer_info older = {.size = offsetof(fourfold_layer_info, experts), .experts = -5};
  CHECK_OK(fourfold_checkpoint_layer(checkpoint, 0, &older));
  CHECK(older.hidden == kHidden && older.intermediate == 64 && older.experts == -5);
  older.size = 1u << 20;
  CHECK_FAILS(fourfold_checkpoint_layer(checkpoint, 0, &older), FOURFOLD_INVALID_ARGUMENT, "size");

  struct {
    fourfold_layer_options known;
    int64_t added;
  } options = {{.size = sizeof options, .backend = "cpu"}, 1};
  fourfold_layer* layer = NULL;
  CHECK_FAILS(fourfold_layer_create(checkpoint, 0, &options.known, &layer), FOURFOLD_UNSUPPORTED,
              "does not know");
  options.added = 0;
  CHECK_OK(fourfold_layer_create(checkpoint, 0, &options.known, &layer));
  fourfold_layer_destroy(layer);
}

static void test_routing(const fourfold_checkpoint* checkpoint, int64_t layer) {
  static const int64_t token_ids[kTokens] = {0, 3, 1, 2, 3}, beyond[kTokens] = {0, 1, 2, 3, INT64_MAX};
  float logits[kTokens * kExperts], expected_logits[kTokens * kExperts];
  float found_weights[kTokens * kTopK], expected_weights[kTokens * kTopK];
  int32_t found_ids[kTokens * kTopK], expected_ids[kTokens * kTopK];
  fourfold_router* router = NULL;
  fourfold_router_info info = {.size = sizeof info};
  CHECK_OK(fourfold_router_create(checkpoint, layer, &router));
  if (router == NULL) return;
  CHECK_OK(fourfold_router_describe(router, &info));
  CHECK(info.hidden == kHidden && info.experts == kExperts && info.top_k == kTopK);
  CHECK((info.vocabulary > 0) == (layer == 0));
  CHECK_OK(fourfold_router_logits(router, x, kTokens, logits));
  CHECK_OK(fourfold_route(router, logits, kTokens, token_ids, found_ids, found_weights));
  CHECK(expected_routing(model_path, layer, kTokens, x, token_ids, expected_logits, expected_ids,
                         expected_weights) == 0);
  CHECK(memcmp(logits, expected_logits, sizeof logits) == 0);
  CHECK(memcmp(found_ids, expected_ids, sizeof found_ids) == 0);
  CHECK(memcmp(found_weights, expected_weights, sizeof found_weights) == 0);

  CHECK_OK(fourfold_router_logits(router, NULL, 0, NULL));
  CHECK_OK(fourfold_route(router, NULL, 0, NULL, NULL, NULL));
  CHECK_FAILS(fourfold_router_logits(router, NULL, 1, logits), FOURFOLD_INVALID_ARGUMENT, "x:");
  CHECK_FAILS(fourfold_router_logits(router, x, 1, NULL), FOURFOLD_INVALID_ARGUMENT, "logits");
  CHECK_FAILS(fourfold_router_logits(router, x, -1, logits), FOURFOLD_INVALID_ARGUMENT, "tokens");
  CHECK_FAILS(fourfold_router_logits(NULL, x, 1, logits), FOURFOLD_INVALID_ARGUMENT, "router");
  CHECK_FAILS(fourfold_route(NULL, logits, 1, token_ids, found_ids, found_weights), FOURFOLD_INVALID_ARGUMENT,
              "router");
  CHECK_FAILS(fourfold_route(router, NULL, 1, token_ids, found_ids, found_weights), FOURFOLD_INVALID_ARGUMENT,
              "logits");
  CHECK_FAILS(fourfold_route(router, logits, 1, token_ids, NULL, found_weights), FOURFOLD_INVALID_ARGUMENT,
              "topk_ids");
  CHECK_FAILS(fourfold_route(router, logits, 1, token_ids, found_ids, NULL), FOURFOLD_INVALID_ARGUMENT,
              "topk_weights");
  CHECK_FAILS(fourfold_route(router, logits, -1, token_ids, found_ids, found_weights),
              FOURFOLD_INVALID_ARGUMENT, "tokens");
  if (layer == 0) {
    CHECK_FAILS(fourfold_route(router, logits, kTokens, NULL, found_ids, found_weights),
                FOURFOLD_INVALID_ARGUMENT, "token_ids");
    CHECK_FAILS(fourfold_route(router, logits, kTokens, beyond, found_ids, found_weights),
                FOURFOLD_INVALID_ARGUMENT, "token id");
  } else {
    CHECK_OK(fourfold_route(router, logits, kTokens, NULL, found_ids, found_weights));
  }
  CHECK_FAILS(fourfold_router_describe(router, NULL), FOURFOLD_INVALID_ARGUMENT, "fourfold_router_info");
  CHECK_FAILS(fourfold_router_describe(NULL, &info), FOURFOLD_INVALID_ARGUMENT, "router");
  CHECK_FAILS(fourfold_router_create(checkpoint, 9, &router), FOURFOLD_NOT_FOUND, "9");
  CHECK_FAILS(fourfold_router_create(NULL, 0, &router), FOURFOLD_INVALID_ARGUMENT, "checkpoint");
  CHECK_FAILS(fourfold_router_create(checkpoint, 0, NULL), FOURFOLD_INVALID_ARGUMENT, "router");
  fourfold_router_destroy(router);
  fourfold_router_destroy(NULL);
}

static void test_layer_options(const fourfold_checkpoint* checkpoint) {
  static const int64_t descending[] = {3, 1}, absent[] = {8};
  const struct {
    fourfold_layer_options options;
    fourfold_status status;
    const char* words;
  } cases[] = {
      {{.size = sizeof(fourfold_layer_options), .backend = "abacus"}, FOURFOLD_INVALID_ARGUMENT, "'abacus'"},
      {{.size = sizeof(fourfold_layer_options), .activations = "int8"}, FOURFOLD_INVALID_ARGUMENT, "'int8'"},
      {{.size = sizeof(fourfold_layer_options), .x_scale = "loud"}, FOURFOLD_INVALID_ARGUMENT, "'loud'"},
      {{.size = sizeof(fourfold_layer_options), .activation_rule = "min"},
       FOURFOLD_INVALID_ARGUMENT,
       "'min'"},
      {{.size = sizeof(fourfold_layer_options), .activations = "bf16", .activation_rule = "mse"},
       FOURFOLD_INVALID_ARGUMENT,
       "activation_rule"},
      {{.size = sizeof(fourfold_layer_options), .intermediate_scale = "loud"},
       FOURFOLD_INVALID_ARGUMENT,
       "'loud'"},
      {{.size = sizeof(fourfold_layer_options), .activations = "bf16", .x_scale = "static"},
       FOURFOLD_INVALID_ARGUMENT,
       "none with bf16"},
      {{.size = sizeof(fourfold_layer_options), .x_max_scale = -1.0f},
       FOURFOLD_INVALID_ARGUMENT,
       "x_max_scale"},
      {{.size = sizeof(fourfold_layer_options), .top_k = -1}, FOURFOLD_INVALID_ARGUMENT, "top_k"},
      {{.size = sizeof(fourfold_layer_options), .expert_count = -1},
       FOURFOLD_INVALID_ARGUMENT,
       "expert_count"},
      {{.size = sizeof(fourfold_layer_options), .expert_count = 2}, FOURFOLD_INVALID_ARGUMENT, "experts"},
      {{.size = sizeof(fourfold_layer_options), .experts = descending}, FOURFOLD_INVALID_ARGUMENT, "experts"},
      {{.size = sizeof(fourfold_layer_options), .experts = descending, .expert_count = 2},
       FOURFOLD_INVALID_ARGUMENT,
       "ascending"},
      {{.size = sizeof(fourfold_layer_options), .experts = absent, .expert_count = 1},
       FOURFOLD_INVALID_ARGUMENT,
       "expert 8"},
  };
  fourfold_layer* layer = NULL;
  for (int64_t i = 0; i < COUNT_OF(cases); ++i) {
    CHECK_FAILS(fourfold_layer_create(checkpoint, 1, &cases[i].options, &layer), cases[i].status,
                cases[i].words);
  }
  CHECK_FAILS(fourfold_layer_create(checkpoint, 9, NULL, &layer), FOURFOLD_NOT_FOUND, "9");
  CHECK_FAILS(fourfold_layer_create(NULL, 0, NULL, &layer), FOURFOLD_INVALID_ARGUMENT, "checkpoint");
  CHECK_FAILS(fourfold_layer_create(checkpoint, 0, NULL, NULL), FOURFOLD_INVALID_ARGUMENT, "created");
  CHECK(layer == NULL);
  fourfold_layer_destroy(NULL);
}

static fourfold_layer* make_layer(const fourfold_checkpoint* checkpoint, fourfold_layer_options options) {
  fourfold_layer* layer = NULL;
  options.size = sizeof options;
  options.backend = "cpu";
  CHECK_OK(fourfold_layer_create(checkpoint, 1, &options, &layer));
  if (layer == NULL) exit(1);
  return layer;
}

static fourfold_workspace* make_workspace(const fourfold_layer* layer, int64_t max_tokens) {
  fourfold_workspace* workspace = NULL;
  CHECK_OK(fourfold_workspace_create(layer, max_tokens, NULL, 0, &workspace));
  if (workspace == NULL) exit(1);
  return workspace;
}

static void test_workspaces(const fourfold_layer* layer) {
  size_t bytes = 0, other = 0;
  fourfold_workspace* workspace = NULL;
  fourfold_workspace_info info = {.size = sizeof info};
  CHECK_OK(fourfold_workspace_bytes(layer, kTokens, &bytes));
  CHECK_OK(fourfold_workspace_bytes(layer, 1000 * kTokens, &other));
  CHECK(bytes > 0 && other > bytes);
  CHECK_FAILS(fourfold_workspace_bytes(NULL, 1, &bytes), FOURFOLD_INVALID_ARGUMENT, "layer");
  CHECK_FAILS(fourfold_workspace_bytes(layer, 1, NULL), FOURFOLD_INVALID_ARGUMENT, "bytes");
  CHECK_FAILS(fourfold_workspace_bytes(layer, -1, &bytes), FOURFOLD_INVALID_ARGUMENT, "tokens");
  CHECK_FAILS(fourfold_workspace_bytes(layer, INT64_MAX, &bytes), FOURFOLD_INVALID_ARGUMENT, "tokens");

  /* The caller's memory, aligned and not. */
  char* memory = malloc(bytes + 2 * FOURFOLD_WORKSPACE_ALIGNMENT);
  char* aligned = memory + FOURFOLD_WORKSPACE_ALIGNMENT - (uintptr_t)memory % FOURFOLD_WORKSPACE_ALIGNMENT;
  CHECK_FAILS(fourfold_workspace_create(layer, kTokens, aligned + 1, bytes, &workspace),
              FOURFOLD_INVALID_ARGUMENT, "multiple of 256");
  CHECK_FAILS(fourfold_workspace_create(layer, kTokens, aligned, bytes - 1, &workspace),
              FOURFOLD_INVALID_ARGUMENT, "bytes");
  CHECK_FAILS(fourfold_workspace_create(layer, kTokens, NULL, bytes, &workspace), FOURFOLD_INVALID_ARGUMENT,
              "null");
  CHECK_FAILS(fourfold_workspace_create(NULL, 1, NULL, 0, &workspace), FOURFOLD_INVALID_ARGUMENT, "layer");
  CHECK_FAILS(fourfold_workspace_create(layer, 1, NULL, 0, NULL), FOURFOLD_INVALID_ARGUMENT, "workspace");
  CHECK_FAILS(fourfold_workspace_create(layer, -1, NULL, 0, &workspace), FOURFOLD_INVALID_ARGUMENT, "tokens");
  CHECK_OK(fourfold_workspace_create(layer, kTokens, aligned, bytes, &workspace));
  if (workspace == NULL) exit(1);
  CHECK_OK(fourfold_workspace_describe(workspace, &info));
  CHECK(info.max_tokens == kTokens && info.bytes == bytes && info.kernel[0] != '\0' &&
        info.reason[0] != '\0');
  CHECK_FAILS(fourfold_workspace_describe(NULL, &info), FOURFOLD_INVALID_ARGUMENT, "workspace");
  CHECK_FAILS(fourfold_workspace_describe(workspace, NULL), FOURFOLD_INVALID_ARGUMENT,
              "fourfold_workspace_info");

  uint16_t inside[kTokens * kHidden], own[kTokens * kHidden];
  fourfold_forward_args args = arguments(inside);
  CHECK_OK(fourfold_forward(layer, workspace, &args));
  fourfold_workspace_destroy(workspace);
  free(memory);
  workspace = make_workspace(layer, kTokens);
  args.y = own;
  CHECK_OK(fourfold_forward(layer, workspace, &args));
  CHECK(memcmp(inside, own, sizeof own) == 0);
  fourfold_workspace_destroy(workspace);
  fourfold_workspace_destroy(NULL);
}

/* Bit for bit what C++ computes, in each format of the activations. */
static void test_values(const fourfold_checkpoint* checkpoint) {
  static const char* const formats[] = {"nvfp4", "nvfp4x2", "fp8", "bf16"};
  uint16_t y[kTokens * kHidden], expected[kTokens * kHidden];
  for (int64_t i = 0; i < COUNT_OF(formats); ++i) {
    fourfold_layer* layer = make_layer(checkpoint, (fourfold_layer_options){.activations = formats[i]});
    fourfold_workspace* workspace = make_workspace(layer, kTokens + 3);
    fourfold_layer_description made = {.size = sizeof made};
    fourfold_forward_args args = arguments(y);
    CHECK_OK(fourfold_layer_describe(layer, &made));
    CHECK(strcmp(made.activations, formats[i]) == 0 && strcmp(made.backend, "cpu") == 0 &&
          made.on_device == 0);
    CHECK(made.hidden == kHidden && made.experts == kExperts && made.top_k == kTopK);
    CHECK(strstr(made.reason, "forced") != NULL && made.x_scale[0] != '\0' &&
          made.intermediate_scale[0] != '\0');
    memset(y, 0xA5, sizeof y);
    CHECK_OK(fourfold_forward(layer, workspace, &args));
    CHECK(expected_forward(model_path, 1, formats[i], NULL, 0, 0, kTokens, x, kIds, kWeights, expected) == 0);
    CHECK(memcmp(y, expected, sizeof y) == 0);
    fourfold_workspace_destroy(workspace);
    fourfold_layer_destroy(layer);
  }
}

/* A rank's part of the experts: ids stay the model's. */
static void test_some_experts(const fourfold_checkpoint* checkpoint) {
  static const int64_t held[] = {2, 3, 6};
  static const int32_t local[kTokens * kTopK] = {-1, -1, 1, 1, -1, 0, -1, -1, -1, 2};
  uint16_t y[kTokens * kHidden], expected[kTokens * kHidden];
  int32_t status = 0;
  fourfold_layer* layer =
      make_layer(checkpoint,
                 (fourfold_layer_options){.experts = held, .expert_count = COUNT_OF(held), .omit_shared = 1});
  fourfold_workspace* workspace = make_workspace(layer, kTokens);
  fourfold_forward_args args = arguments(y);
  args.status = &status;
  CHECK_OK(fourfold_forward(layer, workspace, &args));
  CHECK(expected_forward(model_path, 1, "nvfp4", held, COUNT_OF(held), 1, kTokens, x, local, kWeights,
                         expected) == 0);
  CHECK(memcmp(y, expected, sizeof y) == 0);
  CHECK(status == 0);

  /* Nobody has an expert 8. */
  int32_t wrong[kTokens * kTopK];
  memcpy(wrong, kIds, sizeof wrong);
  wrong[0] = kExperts;
  args.topk_ids = wrong;
  CHECK_OK(fourfold_forward(layer, workspace, &args));
  CHECK(status == FOURFOLD_EXPERT_OUT_OF_RANGE);
  CHECK(memcmp(y, expected, sizeof y) == 0); /* token 0 had no expert here before, either */
  /* It stays set until the caller clears it. */
  args.topk_ids = kIds;
  CHECK_OK(fourfold_forward(layer, workspace, &args));
  CHECK(status == FOURFOLD_EXPERT_OUT_OF_RANGE);
  fourfold_workspace_destroy(workspace);
  fourfold_layer_destroy(layer);
}

/* Strides, int64 ids, float32 results: other ways to say the same. */
static void test_other_arguments(const fourfold_layer* layer, fourfold_workspace* workspace) {
  enum { kStride = kHidden + 8 };
  static uint16_t wide_x[kTokens * kStride], wide_y[kTokens * kStride];
  uint16_t y[kTokens * kHidden];
  float y_f32[kTokens * kHidden];
  int64_t wide_ids[kTokens * kTopK];
  fourfold_forward_args args = arguments(y);
  CHECK_OK(fourfold_forward(layer, workspace, &args));

  memset(wide_y, 0xA5, sizeof wide_y);
  for (int t = 0; t < kTokens; ++t) memcpy(wide_x + t * kStride, x + t * kHidden, kHidden * sizeof *x);
  for (int i = 0; i < kTokens * kTopK; ++i) wide_ids[i] = kIds[i];
  args.x = wide_x;
  args.x_stride = args.y_stride = kStride;
  args.y = wide_y;
  args.topk_ids = NULL;
  args.topk_ids_i64 = wide_ids;
  CHECK_OK(fourfold_forward(layer, workspace, &args));
  for (int t = 0; t < kTokens; ++t) {
    CHECK(memcmp(wide_y + t * kStride, y + t * kHidden, kHidden * sizeof *y) == 0);
    CHECK(wide_y[t * kStride + kHidden] == 0xA5A5); /* beyond the row */
  }

  args = arguments(NULL);
  args.y_f32 = y_f32;
  CHECK_OK(fourfold_forward(layer, workspace, &args));
  for (int i = 0; i < kTokens * kHidden; ++i) {
    uint32_t bits;
    memcpy(&bits, &y_f32[i], sizeof bits);
    /* bf16 is what it rounds to, ties to even. */
    CHECK((uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16) == y[i]);
  }

  /* No tokens: nothing is read or written. */
  fourfold_forward_args none = {.size = sizeof none};
  CHECK_OK(fourfold_forward(layer, workspace, &none));
}

static void test_wrong_arguments(const fourfold_layer* layer, fourfold_workspace* workspace,
                                 fourfold_workspace* of_another) {
  uint16_t y[kTokens * kHidden];
  float y_f32[kTokens * kHidden];
  const int64_t wide_ids[kTokens * kTopK] = {0};
  const fourfold_forward_args good = arguments(y);
  fourfold_forward_args args = good;
  memset(y, 0xA5, sizeof y);
  CHECK_FAILS(fourfold_forward(NULL, workspace, &args), FOURFOLD_INVALID_ARGUMENT, "layer");
  CHECK_FAILS(fourfold_forward(layer, NULL, &args), FOURFOLD_INVALID_ARGUMENT, "workspace");
  CHECK_FAILS(fourfold_forward(layer, workspace, NULL), FOURFOLD_INVALID_ARGUMENT, "args");
  CHECK_FAILS(fourfold_forward(layer, of_another, &args), FOURFOLD_INVALID_ARGUMENT, "workspace");
#define CHECK_REFUSED(change, words)                                                          \
  do {                                                                                        \
    args = good;                                                                              \
    args.change;                                                                              \
    CHECK_FAILS(fourfold_forward(layer, workspace, &args), FOURFOLD_INVALID_ARGUMENT, words); \
  } while (0)
  CHECK_REFUSED(size = 0, "size");
  CHECK_REFUSED(tokens = -1, "tokens");
  CHECK_REFUSED(tokens = kTokens + 1, "tokens: expected at most 5");
  CHECK_REFUSED(x = NULL, "x: expected data");
  CHECK_REFUSED(x_stride = kHidden - 1, "x: expected");
  CHECK_REFUSED(x_stride = -kHidden, "x: expected");
  CHECK_REFUSED(y = NULL, "y and y_f32: expected one of them, found neither");
  CHECK_REFUSED(y_f32 = y_f32, "y and y_f32: expected one of them, found both");
  CHECK_REFUSED(y_stride = 1, "y: expected");
  CHECK_REFUSED(topk_ids = NULL, "topk_ids and topk_ids_i64: expected one of them, found neither");
  CHECK_REFUSED(topk_ids_i64 = wide_ids, "topk_ids and topk_ids_i64: expected one of them, found both");
  CHECK_REFUSED(topk_weights = NULL, "topk_weights: expected data");
  CHECK_REFUSED(stream = y, "stream");
  for (int i = 0; i < kTokens * kHidden; ++i) CHECK(y[i] == 0xA5A5);
}

int main(int argc, char** argv) {
  if (argc != 2) return fprintf(stderr, "usage: c_api_test DIR\n"), 2;
  snprintf(model_path, sizeof model_path, "%s/nvfp4", argv[1]);
  fill_x();
  if (make_model(argv[1]) != 0) return 1;

  test_versions();
  test_backends();
  test_opening();
  fourfold_checkpoint* checkpoint = NULL;
  CHECK_OK(fourfold_checkpoint_open(model_path, NULL, &checkpoint));
  if (checkpoint == NULL) return 1;
  test_checkpoint(checkpoint);
  test_struct_sizes(checkpoint);
  test_routing(checkpoint, 0);
  test_routing(checkpoint, 1);
  test_layer_options(checkpoint);
  test_values(checkpoint);
  test_some_experts(checkpoint);

  /* Handles may go in any order: the layer's and the checkpoint's before the workspace. */
  fourfold_layer* layer = make_layer(checkpoint, (fourfold_layer_options){0});
  fourfold_layer* another = make_layer(checkpoint, (fourfold_layer_options){0});
  fourfold_checkpoint_close(checkpoint);
  test_workspaces(layer);
  fourfold_workspace* workspace = make_workspace(layer, kTokens);
  fourfold_workspace* of_another = make_workspace(another, kTokens);
  fourfold_layer_destroy(another);
  test_other_arguments(layer, workspace);
  test_wrong_arguments(layer, workspace, of_another);
  fourfold_layer_destroy(layer);
  fourfold_workspace_destroy(workspace);
  fourfold_workspace_destroy(of_another);

  if (failures == 0) puts("c_api_test: all hold");
  return failures == 0 ? 0 : 1;
}
