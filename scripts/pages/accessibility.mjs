// Checks pages of Swagger UI with axe-core, as a person sees them who works with them.

import axe from 'axe-core'

// The only rule that the pages' own stylesheet (page.css) can satisfy. The others are about Swagger UI's markup.
export const OUR_RULE = 'color-contrast'

// Shows on the page what a person sees at work: an open form of each method, an answer, an error and a schema.
export async function showEverything(swagger) {
  const operations = await swagger.operations()
  const shown = new Map(operations.map(operation => [operation.method, operation]))
  for (const { method, path } of shown.values()) {
    await swagger.openOperation(method, path)
  }
  await swagger.execute('GET', '/health')
  // The example id in the form belongs to nothing.
  const single = operations.find(({ method, path }) => method === 'GET' && path.endsWith('}'))
  await swagger.execute('GET', single.path)
  // A required field that is empty.
  const block = swagger.operation('GET', single.path)
  await block.locator('.parameters input').first().fill('')
  await block.locator('.execute').click()
  const tab = swagger.operation('POST', shown.get('POST').path).locator('.responses-wrapper .tablinks')
  if ((await tab.count()) > 1) await tab.nth(1).click()
  const models = swagger.page.locator('section.models .models-control, section.models .json-schema-2020-12-accordion')
  if ((await models.count()) > 1) await models.nth(1).click()
  // The pointer would give the element under it another colour.
  await swagger.page.mouse.move(0, 0)
}

// Returns the violations in the part of the page that `selector` names, as [{ rule, impact, count, example, every }].
export async function violations(page, selector = 'html') {
  // A text that still fades in has another colour.
  await page.waitForFunction(() => document.getAnimations().every(animation => animation.playState !== 'running'))
  // Not as a script element, which the page's policy would block.
  await page.evaluate(axe.source)
  const result = await page.evaluate(part => window.axe.run(part, { resultTypes: ['violations'] }), selector)
  return result.violations.map(({ id, impact, nodes }) => ({
    rule: id,
    impact,
    count: nodes.length,
    example: nodes[0].target.flat().join(' '),
    every: nodes.map(node => `${node.target.flat().join(' ')}: ${[...node.any, ...node.all][0]?.message}`),
  }))
}
