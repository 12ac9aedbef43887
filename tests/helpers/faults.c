/* LD_PRELOAD: the FAULT_NTH call of kind FAULT_CALL on a path below FAULT_BELOW fails with errno FAULT_ERRNO.
 * FAULT_NTH 0: all of them. The file FAULT_HIT is made once one has. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int calls;

static int is_below(const char *path)
{
    const char *below = getenv("FAULT_BELOW");
    char here[4096];
    if (!below || !path)
        return 0;
    if (path[0] != '/') {
        long n = syscall(SYS_getcwd, here, sizeof here);
        return n > 0 && !strncmp(here, below, strlen(below));
    }
    return !strncmp(path, below, strlen(below));
}

static int fails(const char *call, const char *path)
{
    const char *wanted = getenv("FAULT_CALL"), *hit = getenv("FAULT_HIT");
    if (!wanted || strcmp(call, wanted) || !is_below(path))
        return 0;
    int nth = atoi(getenv("FAULT_NTH")), number = atomic_fetch_add(&calls, 1) + 1;
    if (nth && number != nth)
        return 0;
    if (hit)
        syscall(SYS_close, (int)syscall(SYS_open, hit, O_CREAT | O_WRONLY, 0600));
    errno = atoi(getenv("FAULT_ERRNO"));
    return 1;
}

static int fails_fd(const char *call, int fd)
{
    char link[64], path[4096];
    if (!getenv("FAULT_CALL") || strcmp(call, getenv("FAULT_CALL")))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlink, link, path, sizeof path - 1);
    if (n < 0 || path[0] != '/') /* a pipe has no path */
        return 0;
    path[n] = 0;
    return fails(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define BY_PATH(type, bad, call, name, types, args) type name types { return fails(call, path) ? bad : REAL(name) args; }
#define BY_FD(type, bad, call, name, types, args) type name types { return fails_fd(call, fd) ? bad : REAL(name) args; }

#define OPEN(name)                                                                                  \
    int name(const char *path, int flags, ...)                                                      \
    {                                                                                               \
        va_list rest;                                                                               \
        va_start(rest, flags);                                                                      \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                     \
        va_end(rest);                                                                               \
        return fails(flags & O_CREAT ? "create" : "open", path) ? -1 : REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

BY_FD(ssize_t, -1, "read", read, (int fd, void *to, size_t n), (fd, to, n))
BY_FD(ssize_t, -1, "read", pread, (int fd, void *to, size_t n, off_t at), (fd, to, n, at))
BY_FD(ssize_t, -1, "read", pread64, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at))
BY_FD(ssize_t, -1, "read", preadv64, (int fd, const struct iovec *to, int n, off64_t at), (fd, to, n, at))
BY_FD(ssize_t, -1, "read", preadv64v2, (int fd, const struct iovec *to, int n, off64_t at, int f), (fd, to, n, at, f))
BY_FD(ssize_t, -1, "write", write, (int fd, const void *from, size_t n), (fd, from, n))
BY_FD(ssize_t, -1, "write", pwrite64, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at))
BY_FD(int, -1, "fsync", fsync, (int fd), (fd))
BY_FD(int, -1, "flock", flock, (int fd, int how), (fd, how))
BY_FD(int, -1, "truncate", ftruncate64, (int fd, off64_t n), (fd, n))
BY_FD(int, -1, "fallocate", fallocate, (int fd, int how, off_t at, off_t n), (fd, how, at, n))
BY_FD(int, -1, "stat", fstat64, (int fd, struct stat64 *to), (fd, to))
BY_PATH(int, -1, "stat", stat64, (const char *path, struct stat64 *to), (path, to))
BY_PATH(int, -1, "stat", lstat64, (const char *path, struct stat64 *to), (path, to))
BY_PATH(int, -1, "stat", fstatat64, (int fd, const char *path, struct stat64 *to, int how), (fd, path, to, how))
BY_PATH(int, -1, "statvfs", statvfs64, (const char *path, struct statvfs64 *to), (path, to))
BY_PATH(ssize_t, -1, "readlink", readlink, (const char *path, char *to, size_t n), (path, to, n))
BY_PATH(int, -1, "mkdir", mkdir, (const char *path, mode_t mode), (path, mode))
BY_PATH(int, -1, "unlink", unlink, (const char *path), (path))
BY_PATH(int, -1, "rename", rename, (const char *path, const char *to), (path, to))
BY_PATH(DIR *, NULL, "list", opendir, (const char *path), (path))

struct dirent64 *readdir64(DIR *folder)
{
    return fails_fd("list", dirfd(folder)) ? NULL : REAL(readdir64)(folder);
}

int close(int fd)
{
    if (!fails_fd("close", fd))
        return REAL(close)(fd);
    int code = errno;
    REAL(close)(fd);
    errno = code;
    return -1;
}

void *mmap64(void *at, size_t n, int protection, int flags, int fd, off64_t offset)
{
    return fd >= 0 && fails_fd("map", fd) ? MAP_FAILED : REAL(mmap64)(at, n, protection, flags, fd, offset);
}

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
    return fd >= 0 && fails_fd("map", fd) ? MAP_FAILED : REAL(mmap)(at, n, protection, flags, fd, offset);
}
