//go:build seccomp

// Compiling a filter of system calls takes libseccomp some 20 ms, half of a container's start, and nearly all containers
// have the same filter. So it is compiled once, in a throw-away process, and remembered.
//
// libcontainer compiles in the container's first process, through libseccomp's functions. The linker puts these wrappers
// before them (--wrap). While recording, they write down every call and in the end the program that came of them. Given
// such a recording, they compare call by call; only if every call is the same does the export return the recorded
// program. At the first difference all calls so far are made up for and libseccomp does its work as ever. So what is
// enforced is what libcontainer asked for, or nothing starts.

#include <errno.h>
#include <seccomp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "seccomp_memo.h"

scmp_filter_ctx __real_seccomp_init(uint32_t action);
int __real_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch);
int __real_seccomp_arch_remove(scmp_filter_ctx ctx, uint32_t arch);
int __real_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value);
int __real_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int call, unsigned int n, const struct scmp_arg_cmp *args);
int __real_seccomp_rule_add_exact_array(scmp_filter_ctx ctx, uint32_t action, int call, unsigned int n, const struct scmp_arg_cmp *args);
int __real_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd);

enum { PASS, RECORD, REPLAY };
enum { INIT = 1, ARCH_ADD, ARCH_REMOVE, ATTR, RULE, RULE_EXACT };

struct call {
	uint32_t op, a, b, n;
	struct scmp_arg_cmp args[6];
};

// The first process of a container has one thread here and compiles one filter; the recording process as well.
static int mode;
static scmp_filter_ctx filter;
static struct call *calls; // recorded, or to compare with
static size_t ncalls, room, at;
static const void *program;
static size_t program_size;

void seccomp_memo_record(void) { mode = RECORD; }

size_t seccomp_memo_calls(const void *memo, size_t size)
{
	uint64_t n;
	if (size < sizeof(n))
		return 0;
	memcpy(&n, memo, sizeof(n));
	if (n == 0 || n > (size - sizeof(n)) / sizeof(*calls))
		return 0;
	size_t end = sizeof(n) + n * sizeof(*calls);
	return size > end && (size - end) % 8 == 0 ? end : 0;
}

// memo is a recording from another process. The memory must stay.
void seccomp_memo_use(const void *memo, size_t size)
{
	size_t end = seccomp_memo_calls(memo, size);
	if (end == 0)
		return;
	calls = (struct call *)((char *)memo + sizeof(uint64_t));
	ncalls = (end - sizeof(uint64_t)) / sizeof(*calls);
	program = (char *)memo + end;
	program_size = size - end;
	mode = REPLAY;
}

static void record(const struct call *c)
{
	if (ncalls == room) {
		size_t more = room ? 2 * room : 512;
		struct call *p = realloc(calls, more * sizeof(*p));
		if (!p) {
			mode = PASS;
			return;
		}
		calls = p;
		room = more;
	}
	calls[ncalls++] = *c;
}

static int make_up_for(void);

// seen notes a call. It says whether the call needn't be made now, because it is the one that was recorded here.
static int seen(const struct call *c, int *result)
{
	*result = 0;
	if (mode == RECORD)
		record(c);
	if (mode != REPLAY)
		return 0;
	if (at < ncalls && memcmp(&calls[at], c, sizeof(*c)) == 0) {
		at++;
		return 1;
	}
	*result = make_up_for();
	return 0;
}

// make_up_for makes the calls that were put off.
static int make_up_for(void)
{
	mode = PASS;
	for (size_t i = 0; i < at; i++) {
		struct call *c = &calls[i];
		int err = 0;
		if (c->op == RULE)
			err = __real_seccomp_rule_add_array(filter, c->a, (int)c->b, c->n, c->args);
		else if (c->op == RULE_EXACT)
			err = __real_seccomp_rule_add_exact_array(filter, c->a, (int)c->b, c->n, c->args);
		if (err)
			return err;
	}
	return 0;
}

static struct call two(uint32_t op, uint32_t a, uint32_t b)
{
	struct call c;
	memset(&c, 0, sizeof(c));
	c.op = op;
	c.a = a;
	c.b = b;
	return c;
}

scmp_filter_ctx __wrap_seccomp_init(uint32_t action)
{
	scmp_filter_ctx ctx = __real_seccomp_init(action);
	if (mode == PASS || !ctx)
		return ctx;
	if (filter) { // a second filter: nothing is remembered of that
		if (mode == REPLAY && make_up_for() != 0)
			return NULL;
		mode = PASS;
		return ctx;
	}
	filter = ctx;
	int err;
	struct call c = two(INIT, action, 0);
	seen(&c, &err);
	return ctx;
}

// What is cheap is done in any case: others may ask the filter for it.

int __wrap_seccomp_arch_add(scmp_filter_ctx ctx, uint32_t arch)
{
	int err;
	struct call c = two(ARCH_ADD, arch, 0);
	if (mode != PASS && !seen(&c, &err) && err)
		return err;
	return __real_seccomp_arch_add(ctx, arch);
}

int __wrap_seccomp_arch_remove(scmp_filter_ctx ctx, uint32_t arch)
{
	int err;
	struct call c = two(ARCH_REMOVE, arch, 0);
	if (mode != PASS && !seen(&c, &err) && err)
		return err;
	return __real_seccomp_arch_remove(ctx, arch);
}

int __wrap_seccomp_attr_set(scmp_filter_ctx ctx, enum scmp_filter_attr attr, uint32_t value)
{
	int err;
	struct call c = two(ATTR, attr, value);
	if (mode != PASS && !seen(&c, &err) && err)
		return err;
	return __real_seccomp_attr_set(ctx, attr, value);
}

static int rule(uint32_t op, scmp_filter_ctx ctx, uint32_t action, int call, unsigned int n, const struct scmp_arg_cmp *args)
{
	if (mode != PASS) {
		int err;
		struct call c = two(op, action, (uint32_t)call);
		if (n > 6)
			return -EINVAL;
		c.n = n;
		if (n)
			memcpy(c.args, args, n * sizeof(*args));
		if (seen(&c, &err))
			return 0;
		if (err)
			return err;
	}
	int err = op == RULE ? __real_seccomp_rule_add_array(ctx, action, call, n, args)
			     : __real_seccomp_rule_add_exact_array(ctx, action, call, n, args);
	if (err && mode == RECORD)
		mode = PASS; // such a filter isn't remembered
	return err;
}

int __wrap_seccomp_rule_add_array(scmp_filter_ctx ctx, uint32_t action, int call, unsigned int n, const struct scmp_arg_cmp *args)
{
	return rule(RULE, ctx, action, call, n, args);
}

int __wrap_seccomp_rule_add_exact_array(scmp_filter_ctx ctx, uint32_t action, int call, unsigned int n, const struct scmp_arg_cmp *args)
{
	return rule(RULE_EXACT, ctx, action, call, n, args);
}

static int write_all(int fd, const void *b, size_t n)
{
	while (n > 0) {
		ssize_t done = write(fd, b, n);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return -1;
		b = (const char *)b + done;
		n -= (size_t)done;
	}
	return 0;
}

int __wrap_seccomp_export_bpf(const scmp_filter_ctx ctx, int fd)
{
	if (mode == REPLAY && ctx == filter) {
		if (at == ncalls)
			return write_all(fd, program, program_size) ? -ECANCELED : 0;
		int err = make_up_for();
		if (err)
			return err;
	}
	if (mode == RECORD && ctx == filter) {
		uint64_t n = ncalls;
		if (write_all(SECCOMP_MEMO_FD, &n, sizeof(n)) || write_all(SECCOMP_MEMO_FD, calls, ncalls * sizeof(*calls)))
			return -ECANCELED;
		int err = __real_seccomp_export_bpf(ctx, SECCOMP_MEMO_FD);
		if (err)
			return err;
	}
	return __real_seccomp_export_bpf(ctx, fd);
}
