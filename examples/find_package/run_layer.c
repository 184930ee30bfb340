/* Runs layer 0 of the model named on the command line on one token of ones: run_layer_c MODEL
   cc run_layer.c $(pkg-config --cflags --libs fourfold) */
#include <fourfold/fourfold.h>
#include <stdio.h>
#include <stdlib.h>

#define TRY(call) \
  if ((call) != FOURFOLD_OK) return fprintf(stderr, "error: %s\n", fourfold_last_error()), 1

int main(int argc, char** argv) {
  fourfold_checkpoint* model = NULL;
  fourfold_layer* layer = NULL;
  fourfold_workspace* workspace = NULL;
  fourfold_layer_options options = {.size = sizeof options, .backend = "cpu"};
  fourfold_layer_description made = {.size = sizeof made};
  TRY(fourfold_checkpoint_open(argc > 1 ? argv[1] : NULL, NULL, &model));
  TRY(fourfold_layer_create(model, /*layer=*/0, &options, &layer));
  TRY(fourfold_workspace_create(layer, /*max_tokens=*/1, NULL, 0, &workspace));
  TRY(fourfold_layer_describe(layer, &made));

  uint16_t* x = malloc((size_t)made.hidden * sizeof *x);
  uint16_t* y = malloc((size_t)made.hidden * sizeof *y);
  int32_t* topk_ids = malloc((size_t)made.top_k * sizeof *topk_ids);
  float* topk_weights = malloc((size_t)made.top_k * sizeof *topk_weights);
  for (int64_t h = 0; h < made.hidden; ++h) x[h] = 0x3F80; /* 1 in bf16 */
  for (int64_t k = 0; k < made.top_k; ++k) topk_ids[k] = (int32_t)k, topk_weights[k] = 0.5f;
  fourfold_forward_args args = {.size = sizeof args, .tokens = 1, .x = x, .y = y};
  args.topk_ids = topk_ids;
  args.topk_weights = topk_weights;
  TRY(fourfold_forward(layer, workspace, &args));
  printf("y[0..3] = %04x %04x %04x %04x\n", (unsigned)y[0], (unsigned)y[1], (unsigned)y[2], (unsigned)y[3]);

  free(x), free(y), free(topk_ids), free(topk_weights);
  fourfold_workspace_destroy(workspace);
  fourfold_layer_destroy(layer);
  fourfold_checkpoint_close(model);
  return 0;
}
