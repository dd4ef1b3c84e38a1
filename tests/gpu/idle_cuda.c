/* A CUDA whose devices do nothing: what the host does for a GPU, run and counted on a machine without one.
 *
 * Preloaded, it answers for the CUDA runtime, the driver, cuBLAS and NCCL. Streams are always done, kernels are counted,
 * and device memory is an address range without access: it reads as zeros where it is copied to the host, and a host
 * that touches it dies. Functions that are not here are made by idle_cuda.py: they return 0, which is success.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Read by tests through ctypes, in this order. NCCL: bytes that a rank gives, or takes from a reduce-scatter. */
struct { unsigned long launches, waits, all_gather, reduce_scatter, all_reduce; } idle_counts;

/* --- memory: two ranges, given out from the front and never taken back ------------------------------------------- */

#define DEVICE_BYTES (1UL << 37) /* 128 GiB, shared by the devices of a process */
#define ADDRESSES (1UL << 44)    /* an expandable segment reserves more than a device has, one a stream */
#define HOST_BYTES (1UL << 34)   /* pinned */
enum { DEVICES = 8, ALIGNMENT = 2 << 20 };
static char *device_memory, *host_memory;
static size_t device_used, host_used;
static __thread int current_device;

__attribute__((constructor)) static void reserve(void) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  device_memory = mmap(NULL, ADDRESSES, PROT_NONE, flags, -1, 0);
  host_memory = mmap(NULL, HOST_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (device_memory == MAP_FAILED || host_memory == MAP_FAILED) abort();
}

static int on_device(const void *p) { return (uintptr_t)p - (uintptr_t)device_memory < ADDRESSES; }
static int is_pinned(const void *p) { return (uintptr_t)p - (uintptr_t)host_memory < HOST_BYTES; }

static cudaError_t take(void **p, char *memory, size_t *used, size_t limit, size_t size) {
  size_t place = __sync_fetch_and_add(used, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  *p = memory + place;
  return place + size <= limit ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaMalloc(void **p, size_t size) { return take(p, device_memory, &device_used, ADDRESSES, size); }
cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
  return take(p, host_memory, &host_used, HOST_BYTES, size);
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) { *free = *total = DEVICE_BYTES; return cudaSuccess; }

/* torch asks where memory lies, and whether a tensor is pinned. */
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p) {
  memset(found, 0, sizeof *found);
  found->type = on_device(p) ? cudaMemoryTypeDevice : is_pinned(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  found->device = current_device;
  found->devicePointer = found->hostPointer = (void *)p;
  return cudaSuccess;
}
int cuPointerGetAttribute(uintptr_t *found, int attribute, uintptr_t p) { *found = p; return 0; } /* Triton: its address */

/* The allocator's expandable segments: a range of addresses that physical memory is mapped into. */
int cuMemAddressReserve(uintptr_t *p, size_t size, size_t alignment, uintptr_t where, unsigned long long flags) {
  return cudaMalloc((void **)p, size);
}
int cuMemGetAllocationGranularity(size_t *size, const void *properties, int option) { *size = ALIGNMENT; return 0; }

static cudaError_t copy(void *to, const void *from, size_t size) {
  if (!on_device(to)) on_device(from) ? memset(to, 0, size) : memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { return copy(to, from, size); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, size);
}

/* --- devices: the limits of an H100, which torch and Triton choose kernels by -------------------------------------- */

enum { SMS = 132 };
/* IDLE_CUDA_CAPABILITY is their compute capability: 80, 100, or, where it is unset, 90. */
static int capability(void) { const char *text = getenv("IDLE_CUDA_CAPABILITY"); return text ? atoi(text) : 90; }
static int shared_memory(void) { return capability() == 80 ? 166912 : 232448; }

cudaError_t cudaGetDeviceCount(int *count) { *count = DEVICES; return cudaSuccess; }
int cuDeviceGetCount(int *count) { *count = DEVICES; return 0; }
cudaError_t cudaGetDevice(int *device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current_device = device; return cudaSuccess; }
int cuDeviceGet(int *handle, int device) { *handle = device; return 0; }
int cuCtxGetDevice(int *device) { *device = current_device; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; } /* else Triton makes one */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "NVIDIA H100 (idle)");
  p->uuid.bytes[0] = (char)(1 + device); /* NCCL's group counts different ones */
  p->totalGlobalMem = DEVICE_BYTES;
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->multiProcessorCount = SMS;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor = shared_memory();
  p->maxGridSize[0] = p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = p->maxThreadsDim[2] = 64;
  p->pciBusID = 1 + device;
  return cudaSuccess;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrMultiProcessorCount: *value = SMS; break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability() % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_memory(); break;
    case cudaDevAttrTextureAlignment: *value = 512; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break; /* a scan is launched in parts of this many blocks */
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    default: *value = 0;
  }
  return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  return cuDeviceGetAttribute(value, attribute, device);
}
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) { snprintf(text, size, "%d", device); return 0; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t error) { return "an error of the idle CUDA"; }
const char *cudaGetErrorName(cudaError_t error) { return "idle"; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the idle CUDA"; return 0; }

/* NVML: before expandable segments torch asks whether GPUs of several nodes share memory; what it gave stays 0, no. */
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) { *device = (void *)1; return 0; }
int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { return 0; }
int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, int *type) { return 3; } /* not supported */
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) { return 3; }
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *infos) { *count = 0; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }

/* --- streams and events: always done; the host's waits are counted ------------------------------------------------- */

static void *fresh(void) { static char *next = (char *)4096; return __sync_add_and_fetch(&next, 64); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int p) { *s = fresh(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = fresh(); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = fresh(); return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) { *status = 0; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id) {
  *status = 0;
  if (id) *id = 0;
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = 1; return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*work)(void *), void *data) { work(data); return cudaSuccess; }

static cudaError_t waited(void) { __sync_fetch_and_add(&idle_counts.waits, 1); return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waited(); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waited(); }
cudaError_t cudaDeviceSynchronize(void) { return waited(); }

/* --- kernels: torch's own, and Triton's through the driver ---------------------------------------------------------- */

static int launched(void) { __sync_fetch_and_add(&idle_counts.launches, 1); return 0; }
void **__cudaRegisterFatBinary(void *binary) { return calloc(1, 8); }
cudaError_t cudaLaunchKernel(const void *kernel) { return launched(); }
cudaError_t __cudaLaunchKernel(const void *kernel) { return launched(); }
cudaError_t cudaLaunchKernelExC(const void *config, const void *kernel, void **arguments) { return launched(); }
cudaError_t __cudaGetKernel(const void **kernel, const void *host) { *kernel = host; return cudaSuccess; }
int cuLaunchKernel(void *function) { return launched(); }
int cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) { return launched(); }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 64;
  found->ptxVersion = found->binaryVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int size, size_t memory) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 1; return cudaSuccess; }
int cuModuleLoad(void **module) { *module = fresh(); return 0; }
int cuModuleLoadData(void **module) { *module = fresh(); return 0; }
int cuModuleGetFunction(void **function) { *function = fresh(); return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }

/* Both libraries look functions of the driver up by name; one that is not here does nothing. */
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

/* --- cuBLAS: handles and modes are read before a product, which does nothing ---------------------------------------- */

int cublasCreate_v2(void **handle) { *handle = fresh(); return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
/* cublasLt: one algorithm, or torch gives up; torch reads neither of its fields. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
  *found = 1;
  return 0;
}

/* --- NCCL: nobody else is there, and everything has arrived; bytes are counted -------------------------------------- */

static const int ITEMSIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* of ncclDataType_t */
enum { NO_COLOR = -1 };

static int join(void **made) { *made = fresh(); return 0; }
int ncclGetVersion(int *version) { *version = 22800; return 0; }
int ncclCommInitRank(void **made) { return join(made); }
int ncclCommInitRankConfig(void **made) { return join(made); }
/* Where the default group has a device, torch splits every other group from it: each rank takes part, one that is not
 * in the new group without a color, and the others wait until they have been given a communicator. */
int ncclCommSplit(void *whole, int color, int rank, void **made, void *config) {
  return color == NO_COLOR ? 0 : join(made);
}
int ncclCommGetAsyncError(void *communicator, int *error) { *error = 0; return 0; }
const char *ncclGetErrorString(int error) { return "an error of the idle NCCL"; }
const char *ncclGetLastError(void *communicator) { return "none"; }

int ncclAllGather(const void *from, void *to, size_t count, int type) {
  idle_counts.all_gather += count * ITEMSIZES[type];
  return 0;
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type) {
  idle_counts.reduce_scatter += count * ITEMSIZES[type];
  return 0;
}
int ncclAllReduce(const void *from, void *to, size_t count, int type) {
  idle_counts.all_reduce += count * ITEMSIZES[type];
  return 0;
}
