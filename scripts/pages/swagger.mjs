// A page of Swagger UI, used as a person uses it: by clicks and keys, reading what the page shows.

// A slow machine may need seconds for an answer, and a page with many open operations seconds to draw it.
const PATIENCE_MS = 30_000

export class SwaggerPage {
  // `work` counts what the person does: { clicks, fields, copies, steps, front }. `front` is the tab in use.
  constructor(name, page, work) {
    this.name = name
    this.page = page
    this.work = work
    // Policy faults come as console errors, each with the text that names the blocked thing.
    this.consoleErrors = []
    page.on('console', message => message.type() === 'error' && this.consoleErrors.push(message.text()))
    page.on('pageerror', error => this.consoleErrors.push(String(error)))
    page.setDefaultTimeout(PATIENCE_MS)
  }

  async open(url) {
    this.work.front = this
    await this.page.goto(url)
    await this.page.locator('.opblock').first().waitFor()
  }

  // A browser draws a tab in the background slowly or not at all.
  async bringToFront() {
    if (this.work.front === this) return
    this.work.front = this
    this.work.clicks += 1
    await this.page.bringToFront()
  }

  async click(locator) {
    this.work.clicks += 1
    await locator.click()
  }

  // The person clicks into the field and pastes.
  async fill(locator, text) {
    this.work.clicks += 1
    this.work.fields += 1
    await locator.fill(text)
  }

  operation(method, path) {
    return this.page.locator(`.opblock-${method.toLowerCase()}`, {
      has: this.page.locator(`.opblock-summary-path[data-path="${path}"]`),
    })
  }

  // Returns the milliseconds from the click until the form can be used, or undefined if it was open already.
  async openOperation(method, path) {
    await this.bringToFront()
    const block = this.operation(method, path)
    if (await block.locator('.execute').isVisible()) return undefined
    // The page looks and takes the time itself, because the way from here to the browser would add to it.
    const opened = block.evaluate(
      element =>
        new Promise(resolve => {
          const look = clickedAt => {
            const isReady = element.querySelector('.execute') !== null
            requestAnimationFrame(isReady ? () => resolve(performance.now() - clickedAt) : () => look(clickedAt))
          }
          element.addEventListener('click', event => look(event.timeStamp), { once: true, capture: true })
        }),
    )
    await this.click(block.locator('.opblock-summary-control'))
    return Math.round(await opened)
  }

  // Opens an operation, fills its form, executes it, and returns the status and the body that the page shows.
  // Fields that `form` does not name stay as the page fills them.
  async execute(method, path, form = {}) {
    const block = this.operation(method, path)
    const openMs = await this.openOperation(method, path)
    for (const [name, value] of Object.entries(form.parameters ?? {})) {
      await this.fill(block.locator(`tr[data-param-name="${name}"]`).locator('input'), value)
    }
    if (form.body !== undefined) {
      await this.fill(block.locator('textarea.body-param__text'), JSON.stringify(form.body, null, 2))
    }
    const answered = this.page.waitForResponse(
      response => response.request().method() === method && matches(path, new URL(response.url()).pathname),
    )
    // A form with a fault sends nothing, and the failed click explains that better than this promise.
    answered.catch(() => {})
    const clicked = block.evaluate(
      element =>
        new Promise(resolve => {
          element.addEventListener('click', event => resolve(event.timeStamp), { once: true, capture: true })
        }),
    )
    await this.click(block.locator('.execute'))
    const id = (await answered).headers()['x-request-id']
    // An earlier answer stays until the new one is there. The id in the answer's headers tells them apart.
    const answer = block.locator('.live-responses-table', { hasText: id })
    await answer.waitFor()
    const shownMs = Math.round(await answer.evaluate((_, clickedAt) => performance.now() - clickedAt, await clicked))
    const status = Number.parseInt(await answer.locator('.response .response-col_status').innerText(), 10)
    const text = answer.locator('.response-col_description .highlight-code pre')
    const body = (await text.count()) > 0 ? JSON.parse(await text.first().textContent()) : undefined
    this.work.steps.push({ page: this.name, operation: `${method} ${path}`, status, openMs, shownMs })
    return { status, body, shown: answer }
  }

  // Which operations the page shows, as [{ method, path }].
  async operations() {
    return this.page.locator('.opblock').evaluateAll(blocks =>
      blocks.map(block => ({
        method: block.querySelector('.opblock-summary-method').textContent.trim(),
        path: block.querySelector('.opblock-summary-path').dataset.path,
      })),
    )
  }

  async openAuthorization() {
    await this.bringToFront()
    await this.click(this.page.locator('.btn.authorize').first())
    await this.page.locator('.dialog-ux .modal-ux').waitFor()
  }

  async authorize(value) {
    await this.openAuthorization()
    const dialog = this.page.locator('.dialog-ux .modal-ux')
    await this.fill(dialog.locator('input[type="text"]').first(), value)
    await this.click(dialog.locator('button.authorize'))
    await this.click(dialog.locator('button.btn-done'))
  }
}

// `/tickets/{id}/qr` is a path's name, `/tickets/1/qr` the path.
function matches(name, path) {
  const pattern = name.split(/\{[^}]*\}/).map(part => part.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')).join('[^/]+')
  return new RegExp(`^${pattern}$`).test(path)
}
