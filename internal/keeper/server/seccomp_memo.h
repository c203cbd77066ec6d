#include <stddef.h>

// Where a recording is written to.
#define SECCOMP_MEMO_FD 3

void seccomp_memo_record(void);
// The size of a recording without its program, 0 when it is malformed or has none.
size_t seccomp_memo_calls(const void *memo, size_t size);

void seccomp_memo_use(const void *memo, size_t size);
