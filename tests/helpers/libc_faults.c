/* Preloaded into a process: the at-th call of libc that touches a path under `root` fails with `number`, whichever
   library makes it: Python, Rust (safetensors, tokenizers), torch, Arrow, numpy. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX], struck[PATH_MAX + 64];
static long at = -1, count = 0; /* at: 0 counts only, -1 does nothing */
static int number = ENOSPC;

void libc_faults_begin(const char *under, long moment, int error) {
  snprintf(root, sizeof root, "%s", under);
  struck[0] = 0, count = 0, number = error, at = moment;
}
void libc_faults_end(void) { at = -1; }
long libc_faults_count(void) { return count; }
const char *libc_faults_struck(void) { return struck; }

static int fails(const char *name, const char *path) {
  if (at < 0 || !path || strncmp(path, root, strlen(root))) return 0;
  if (__sync_add_and_fetch(&count, 1) != at) return 0;
  snprintf(struck, sizeof struck, "%s %s", name, path + strlen(root));
  errno = number;
  return 1;
}

static int handle_fails(const char *name, int handle) {
  if (at < 0) return 0;
  char link[64], path[PATH_MAX];
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t length = readlink(link, path, sizeof path - 1);
  errno = before;
  if (length <= 0) return 0;
  path[length] = 0;
  return fails(name, path);
}

#define REAL(type, name, ...)             \
  static type (*real)(__VA_ARGS__) = 0;   \
  if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define MODE(flags, mode)                 \
  mode_t mode = 0;                        \
  if (flags & (O_CREAT | O_TMPFILE)) {    \
    va_list more;                         \
    va_start(more, flags);                \
    mode = va_arg(more, mode_t);          \
    va_end(more);                         \
  }

#define OPEN(name)                                         \
  int name(const char *path, int flags, ...) {             \
    MODE(flags, mode)                                      \
    REAL(int, name, const char *, int, ...);               \
    return fails(#name, path) ? -1 : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                \
  int name(int folder, const char *path, int flags, ...) {          \
    MODE(flags, mode)                                               \
    REAL(int, name, int, const char *, int, ...);                   \
    return fails(#name, path) ? -1 : real(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

/* name, type of the result, its parameters, their names; of a handle and of a path */
#define OF_HANDLE(name, type, parameters, ...)          \
  type name parameters {                                \
    REAL(type, name, TYPES parameters);                 \
    return handle_fails(#name, handle) ? -1 : real(__VA_ARGS__); \
  }
#define TYPES(...) __VA_ARGS__
OF_HANDLE(read, ssize_t, (int handle, void *to, size_t size), handle, to, size)
OF_HANDLE(pread64, ssize_t, (int handle, void *to, size_t size, off64_t from), handle, to, size, from)
OF_HANDLE(write, ssize_t, (int handle, const void *what, size_t size), handle, what, size)
OF_HANDLE(writev, ssize_t, (int handle, const struct iovec *what, int pieces), handle, what, pieces)
OF_HANDLE(pwrite64, ssize_t, (int handle, const void *what, size_t size, off64_t to), handle, what, size, to)
OF_HANDLE(fsync, int, (int handle), handle)
OF_HANDLE(fdatasync, int, (int handle), handle)
OF_HANDLE(ftruncate64, int, (int handle, off64_t size), handle, size)

#define OF_PATH(name, parameters, ...)             \
  int name parameters {                            \
    REAL(int, name, TYPES parameters);             \
    return fails(#name, path) ? -1 : real(__VA_ARGS__); \
  }
OF_PATH(rename, (const char *path, const char *to), path, to)
OF_PATH(mkdir, (const char *path, mode_t mode), path, mode)
OF_PATH(unlink, (const char *path), path)

#define MAP(name, offset)                                                                \
  void *name(void *where, size_t size, int protection, int flags, int handle, offset from) { \
    REAL(void *, name, void *, size_t, int, int, int, offset);                           \
    if (handle >= 0 && handle_fails(#name, handle)) return errno = ENOMEM, MAP_FAILED;   \
    return real(where, size, protection, flags, handle, from);                           \
  }
MAP(mmap, off_t)
MAP(mmap64, off64_t)
