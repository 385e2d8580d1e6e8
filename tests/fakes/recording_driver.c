/* Recording driver: a libcuda.so.1 for machines without one, which logs what cuda-bindings calls, with the value behind
   every kernel parameter (FAKE_SIZES: size in bytes of each, one digit per parameter). A call that it does not know is
   refused. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static FILE *calls(void) {
  static FILE *file;
  if (!file) file = fopen(getenv("FAKE_LOG"), "w");
  return file;
}

int cuGetErrorString(int status, const char **text) {
  *text = status == 700 ? "an illegal memory access was encountered" : "something else";
  return 0;
}
int cuLibraryLoadData(void **library, const void *code, void *a, void **b, unsigned c, void *d, void **e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  fprintf(calls(), "load %.3s\n", (const char *)code + 1);
  *library = (void *)0x1111;
  return 0;
}
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  fprintf(calls(), "kernel %s of %p\n", name, library);
  *kernel = (void *)0x2222;
  return 0;
}
int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  fprintf(calls(), "attribute %d = %d of %p on %d\n", attribute, value, kernel, device);
  return 0;
}
int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
  static uint64_t next = 0x30000;
  fprintf(calls(), "alloc %zu at %#llx\n", bytes, (unsigned long long)next);
  *address = next;
  next += 0x10000;
  return 0;
}
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t count, void *stream) {
  (void)stream;
  fprintf(calls(), "set %#llx to %u, %zu times\n", (unsigned long long)address, value, count);
  return 0;
}
int cuStreamCreate(void **stream, unsigned flags) {
  (void)flags;
  *stream = (void *)0x77777;
  return 0;
}
int cuStreamDestroy(void *stream) {
  (void)stream;
  return 0;
}
int cuStreamSynchronize(void *stream) {
  fprintf(calls(), "wait for %p\n", stream);
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  fprintf(calls(), "free %#llx\n", (unsigned long long)address);
  return 0;
}
int cuLibraryUnload(void *library) {
  fprintf(calls(), "unload %p\n", library);
  fclose(calls());
  return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
  fprintf(calls(), "launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %d:", function, gx, gy, gz, bx,
          by, bz, shared, stream, extra != NULL);
  const char *sizes = getenv("FAKE_SIZES");
  for (int i = 0; sizes[i]; i++) {
    uint64_t value = 0;
    memcpy(&value, parameters[i], sizes[i] - '0');
    fprintf(calls(), " %llu", (unsigned long long)value);
  }
  fprintf(calls(), "\n");
  return (uintptr_t)stream == 0xbad0 ? 700 : 0;
}
typedef struct {
  int id;
  char pad[4];
  union {
    char pad[64];
    int allowed;
  } value;
} attribute;
typedef struct {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void *stream;
  attribute *attributes;
  unsigned count;
} config;
int cuLaunchKernelEx(const config *c, void *function, void **parameters, void **extra) {
  for (unsigned i = 0; i < c->count; i++)
    fprintf(calls(), "with %d = %d: ", c->attributes[i].id, c->attributes[i].value.allowed);
  return cuLaunchKernel(function, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, c->stream, parameters, extra);
}
int cuGetProcAddress_v2(const char *symbol, void **address, int version, uint64_t flags, int *status) {
  (void)version, (void)flags;
  static struct {
    const char *name;
    void *function;
  } known[] = {
      {"cuGetErrorString", cuGetErrorString},     {"cuLibraryLoadData", cuLibraryLoadData},
      {"cuLibraryGetKernel", cuLibraryGetKernel}, {"cuKernelSetAttribute", cuKernelSetAttribute},
      {"cuLibraryUnload", cuLibraryUnload},       {"cuLaunchKernel", cuLaunchKernel},
      {"cuLaunchKernelEx", cuLaunchKernelEx},     {"cuStreamSynchronize", cuStreamSynchronize},
      {"cuMemAlloc", cuMemAlloc_v2},              {"cuMemsetD8Async", cuMemsetD8Async},
      {"cuStreamCreate", cuStreamCreate},         {"cuStreamDestroy", cuStreamDestroy},
      {"cuMemFree", cuMemFree_v2},
      {"cuGetProcAddress", cuGetProcAddress_v2},
  };
  *address = NULL;
  for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
    if (!strcmp(symbol, known[i].name)) *address = known[i].function;
  if (status) *status = *address ? 0 : 1;
  return *address ? 0 : 500;
}
