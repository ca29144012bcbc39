/* A disk that fails, in front of the real one: preloaded, it stands between a process and its reads.
 *
 * Reads of files *.safetensors fail with EIO, come short, or wait, by chance. FLAKY is
 * "seed fail short wait": the last three in one of 10,000 reads. FLAKY_COUNTS names a file of four
 * 64-bit counters: reads, failures, short reads, waits.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef ssize_t (*pread_function)(int, void *, size_t, off64_t);
typedef ssize_t (*read_function)(int, void *, size_t);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t state, fail, shorten, pause_, *counts;

static void start(void) {
  static uint64_t nowhere[4];
  unsigned long long seed = 0, a = 0, b = 0, c = 0;
  const char *plan = getenv("FLAKY"), *file = getenv("FLAKY_COUNTS");
  if (counts) return;
  counts = nowhere;
  if (plan) sscanf(plan, "%llu %llu %llu %llu", &seed, &a, &b, &c);
  state = seed * 2654435761u + 88172645463325252u, fail = a, shorten = b, pause_ = c;
  int fd = file ? open(file, O_RDWR) : -1;
  if (fd >= 0) {
    void *map = mmap(NULL, 32, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map != MAP_FAILED) counts = map;
    close(fd);
  }
}

static int is_weights(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 12) return 0;
  path[length] = 0;
  return strcmp(path + length - 12, ".safetensors") == 0;
}

/* Returns the bytes to ask for, 0 for a failure. */
static size_t choose(int fd, size_t size) {
  int saved = errno;
  if (!is_weights(fd)) return errno = saved, size;
  pthread_mutex_lock(&lock);
  start();
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  uint64_t roll = state % 10000;
  counts[0]++;
  int kind = roll < fail ? 1 : roll < fail + shorten ? 2 : roll < fail + shorten + pause_ ? 3 : 0;
  if (kind == 2 && size < 2) kind = 0;
  if (kind) counts[kind]++;
  pthread_mutex_unlock(&lock);
  if (kind == 1) return errno = EIO, 0;
  if (kind == 3) usleep(100000);
  return errno = saved, kind == 2 ? size / 2 : size;
}

ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
  pread_function next = (pread_function)dlsym(RTLD_NEXT, "pread64");
  size_t asked = size ? choose(fd, size) : 0;
  return size && !asked ? -1 : next(fd, data, asked, offset);
}

ssize_t pread(int fd, void *data, size_t size, off_t offset) {
  return pread64(fd, data, size, offset);
}

ssize_t read(int fd, void *data, size_t size) {
  read_function next = (read_function)dlsym(RTLD_NEXT, "read");
  size_t asked = size ? choose(fd, size) : 0;
  return size && !asked ? -1 : next(fd, data, asked);
}
