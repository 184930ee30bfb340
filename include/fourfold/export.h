/* FOURFOLD_EXPORT: what the shared library shows to those who link it. Everything else stays hidden. */
#ifndef FOURFOLD_EXPORT_H_
#define FOURFOLD_EXPORT_H_

/* Public C++ headers open `namespace FOURFOLD_EXPORT fourfold`, which covers all that such a block declares;
 * in C it stands before each function. Static and shared library are made of the same objects, so it does not
 * depend on which of them is used. */
#if defined(__cplusplus)
#define FOURFOLD_EXPORT [[gnu::visibility("default")]]
#else
#define FOURFOLD_EXPORT __attribute__((visibility("default")))
#endif

#endif /* FOURFOLD_EXPORT_H_ */
