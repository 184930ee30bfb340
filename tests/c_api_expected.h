/* For c_api_test.c: a model to run, and what the C++ interface computes of it. Functions return 0, or 1 after
 * printing what went wrong. */
#ifndef FOURFOLD_TESTS_C_API_EXPECTED_H_
#define FOURFOLD_TESTS_C_API_EXPECTED_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A DeepSeek-V4 of two layers, 8 experts, H 128, I 64, K 2, with a shared expert; layer 0 is hash-routed.
 * Writes DIR/nvfp4. */
int make_model(const char* directory);

/* y [tokens, H] of the backend "cpu"; x [tokens, H], ids and weights [tokens, 2]. `experts` of the model that
 * the layer holds, and by whose places in this list ids go; none: all. `activations` by name. */
int expected_forward(const char* model, int64_t layer, const char* activations, const int64_t* experts,
                     int64_t expert_count, int omit_shared, int64_t tokens, const uint16_t* x,
                     const int32_t* topk_ids, const float* topk_weights, uint16_t* y);

/* The model's router: logits [tokens, 8], ids and weights [tokens, 2]. */
int expected_routing(const char* model, int64_t layer, int64_t tokens, const uint16_t* x,
                     const int64_t* token_ids, float* logits, int32_t* topk_ids, float* topk_weights);

#ifdef __cplusplus
}
#endif

#endif
