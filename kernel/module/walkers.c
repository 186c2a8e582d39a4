// SPDX-License-Identifier: GPL-2.0
/*
 * Wait for whoever walks over page frames to have left a block that is offline.
 *
 * Compaction asks whether a pageblock is online, may be preempted, and then reads
 * its struct pages, under no lock. Were they removed by then, the host would oops.
 * Nothing in the kernel keeps it from that: it is rare where memory is seldom
 * removed, and happened within a minute of stress with this module.
 *
 * A walk does not sleep between the question and the last struct page, and takes
 * a millisecond. So each task that is runnable when the block is offline is
 * waited for until it has slept, has been seen in user space, has ended a page
 * fault, or has had a processor for long enough. Who asks later is told that the
 * block is offline.
 *
 * A task that gets no processor has left by none of these: one of a low priority
 * beside many others, or beside a real-time one that never rests. So the wait has
 * a deadline. No lock is held meanwhile, and the block can still go online again.
 *
 * synchronize_rcu_tasks() would wait for the first two of these. It takes 50 to
 * 300 ms on an idle host, and has no end where a task does nothing but run into
 * page faults.
 */
#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/sched/task.h>
#include <linux/slab.h>

#include "internal.h"

/* Of a processor's time. A walk takes 1 % of it, unless the kernel debugs itself. */
#define ENOUGH (50 * NSEC_PER_MSEC)
#define MORE 64		/* tasks that may have become runnable since they were counted */

struct runner {
	struct task_struct *task;
	unsigned long sleeps;
	unsigned long faults;
	u64 user;
	u64 ran;
};

static struct runner state_of(struct task_struct *task)
{
	return (struct runner){
		.task = task,
		.sleeps = READ_ONCE(task->nvcsw),
		.faults = READ_ONCE(task->min_flt) + READ_ONCE(task->maj_flt),
		.user = READ_ONCE(task->utime),
		.ran = READ_ONCE(task->se.sum_exec_runtime),
	};
}

static bool has_left(const struct runner *before)
{
	struct runner now = state_of(before->task);

	return !task_is_running(now.task) || now.sleeps != before->sleeps ||
	       now.faults != before->faults || now.user != before->user ||
	       now.ran - before->ran > ENOUGH;
}

/* Note up to @max tasks that are runnable. How many there are. */
static unsigned int find_runners(struct runner *runners, unsigned int max)
{
	struct task_struct *process, *task;
	unsigned int nr = 0;

	rcu_read_lock();
	for_each_process_thread(process, task) {
		if (task == current || !task_is_running(task))
			continue;
		if (nr < max) {
			get_task_struct(task);
			runners[nr] = state_of(task);
		}
		nr++;
	}
	rcu_read_unlock();
	return nr;
}

int offmap_await_walkers(unsigned long deadline)
{
	struct runner *runners = NULL;
	unsigned int nr, max = 0, i;
	int ret = 0;

	/* Not before what they ask is answered in a new way. */
	smp_mb();
	while ((nr = find_runners(runners, max)) > max) {
		for (i = 0; i < max; i++)
			put_task_struct(runners[i].task);
		kvfree(runners);
		max = nr + MORE;
		runners = kvmalloc_array(max, sizeof(*runners), GFP_KERNEL);
		if (!runners)
			return -ENOMEM;
	}
	for (i = 0; i < nr; i++) {
		while (!ret && !has_left(&runners[i])) {
			if (time_after_eq(jiffies, deadline))
				ret = -ETIMEDOUT;
			else
				usleep_range(500, 1000);
		}
		put_task_struct(runners[i].task);
	}
	kvfree(runners);
	return ret;
}
