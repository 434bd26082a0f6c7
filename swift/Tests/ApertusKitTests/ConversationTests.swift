import ApertusKit
import ApertusMLX
import Foundation
import Testing

/// Answers against Python's, which MLX has computed on this machine from the same folder.
@Suite(.serialized) struct ConversationTests {
    @Test func answersAsPython() async throws {
        let (apertus, expected) = (try await KitFixtures.load(), try KitFixtures.expected)
        for question in expected.questions {
            let chat = apertus.conversation()
            let text = try await text(of: chat.ask(question.prompt, options: KitFixtures.greedy()))
            #expect(text == question.text)
            #expect(chat.lastOutcome?.tokenIDs == question.token_ids)
        }
        let raw = try await text(
            of: apertus.continuation(of: expected.raw.prompt, options: KitFixtures.greedy()))
        #expect(raw == expected.raw.text)
    }

    @Test func goesOnWithWhatHasBeenComputed() async throws {
        let (apertus, expected) = (try await KitFixtures.load(), try KitFixtures.expected)
        let chat = apertus.conversation()
        _ = try await text(
            of: chat.ask(expected.questions[0].prompt, options: KitFixtures.greedy()))
        let second = try await text(
            of: chat.ask(expected.second_turn.prompt, options: KitFixtures.greedy()))
        #expect(second == expected.second_turn.text)
        let reused = try #require(chat.lastOutcome?.reusedPromptTokens)
        #expect(reused >= expected.questions[0].token_ids.count)
        #expect(chat.messages.count == 4)
    }

    /// Another day, in another process, with what a file holds.
    @Test func goesOnFromAFile() async throws {
        let expected = try KitFixtures.expected
        let file = FileManager.default.temporaryDirectory
            .appendingPathComponent("apertus-\(UUID().uuidString)")
        defer { try? FileManager.default.removeItem(at: file) }
        let apertus = try await KitFixtures.load()
        let chat = apertus.conversation()
        _ = try await text(
            of: chat.ask(expected.questions[0].prompt, options: KitFixtures.greedy()))
        let kept = try await apertus.savePromptCache(to: file)

        let other = try await KitFixtures.load()
        let later = other.conversation()
        try later.load(chat.messages)
        #expect(try await other.restorePromptCache(from: file) == kept)
        let second = try await text(
            of: later.ask(expected.second_turn.prompt, options: KitFixtures.greedy()))
        #expect(second == expected.second_turn.text)
        let reused = try #require(later.lastOutcome?.reusedPromptTokens)
        #expect(reused >= expected.questions[0].token_ids.count)
        // What cannot be opened leaves a model that answers.
        try Data("x".utf8).write(to: file)
        await #expect(throws: ApertusError.self) { try await other.restorePromptCache(from: file) }
        let again = try await text(of: later.retry(options: KitFixtures.greedy()))
        #expect(again == expected.second_turn.text)
    }

    /// Ending the loop behind each token leaves a conversation that answers as one that was not
    /// ended.
    @Test func endsAtEachToken() async throws {
        let (apertus, expected) = (try await KitFixtures.load(), try KitFixtures.expected)
        let question = expected.questions[0]
        for count in 0 ..< question.token_ids.count {
            let chat = apertus.conversation()
            var left = count
            for try await _ in chat.ask(question.prompt, options: try KitFixtures.greedy()) {
                if left == 0 { break }
                left -= 1
            }
            await apertus.stopAndWait()
            let said = try #require(chat.lastOutcome).answer.text
            #expect(question.text.hasPrefix(said))
            let again = try await text(of: chat.retry(options: KitFixtures.greedy()))
            #expect(again == question.text, "after \(count) pieces")
        }
    }

    @Test func aCancelledTaskEndsItsAnswer() async throws {
        let apertus = try await KitFixtures.load()
        let chat = apertus.conversation()
        var options = AnswerOptions.greedy
        options.maxTokens = 1000
        let pieces = apertus.continuation(of: "The capital of France is", options: options)
        let reading = Task { try await text(of: pieces) }
        reading.cancel()
        _ = try await reading.value
        await apertus.stopAndWait()
        #expect(!apertus.isBusy)
        let question = try KitFixtures.expected.questions[1]
        #expect(
            try await text(of: chat.ask(question.prompt, options: KitFixtures.greedy()))
                == question.text)
    }

    /// Waiting for the end includes answers whose turn has not come, however late the task is that
    /// would have begun them.
    @Test func stopAndWaitLeavesNobodyWaiting() async throws {
        let apertus = try await KitFixtures.load()
        for _ in 0 ..< 100 {
            let pieces = apertus.continuation(
                of: "The capital of France is", options: try KitFixtures.greedy())
            await apertus.stopAndWait()
            #expect(!apertus.isBusy)
            _ = try await text(of: pieces)
        }
    }

    /// A stream that has ended belongs to an answer that nobody is busy with.
    @Test func nobodyIsBusyBehindTheEnd() async throws {
        let (apertus, question) = (
            try await KitFixtures.load(), try KitFixtures.expected.questions[0].prompt
        )
        var options = try KitFixtures.greedy()
        options.maxTokens = 1
        for _ in 0 ..< 100 {
            _ = try await text(of: apertus.continuation(of: question, options: options))
            #expect(!apertus.isBusy)
        }
    }

    /// Asks from detached tasks are answered one at a time, on one thread, each as if it were
    /// alone.
    @Test func twoHundredAsksOnOneThread() async throws {
        let (apertus, expected) = (try await KitFixtures.load(), try KitFixtures.expected)
        let (threads, count) = (Threads(), sized(200, 60))
        var options = try KitFixtures.greedy()
        options.maxTokens = 3
        let chosen = options
        let found = try await withThrowingTaskGroup(of: (Int, [Int]).self) { group in
            for index in 0 ..< count {
                group.addTask {
                    try await Task.detached {
                        let chat = apertus.conversation()
                        let question = expected.questions[index % 3].prompt
                        let pieces = chat.ask(question, options: chosen) { _ in threads.note() }
                        for try await _ in pieces {}
                        return (index, chat.lastOutcome?.tokenIDs ?? [])
                    }.value
                }
            }
            return try await group.reduce(into: [Int: [Int]]()) { $0[$1.0] = $1.1 }
        }
        for (index, ids) in found {
            #expect(ids == Array(expected.questions[index % 3].token_ids.prefix(3)))
        }
        #expect(found.count == count)
        #expect(threads.count == 1)
    }

    @Test func answersInTheOrderOfTheAsks() async throws {
        let apertus = try await KitFixtures.load()
        let order = Order()
        var options = AnswerOptions.greedy
        options.maxTokens = 2
        let streams = (0 ..< 20).map { index in
            apertus.continuation(of: "The", options: options, onEnd: { _ in order.add(index) })
        }
        for stream in streams { _ = try await text(of: stream) }
        #expect(order.numbers == Array(0 ..< 20))
    }

    @Test func toolResultsGoBack() async throws {
        let apertus = try await KitFixtures.load()
        let tool = try ToolDefinition(name: "now", description: "The time")
        let chat = apertus.conversation(tools: [tool])
        let call = ToolCall(id: "call_1", name: "now", arguments: "{}")
        chat.messages = [.user("How late is it?"), .assistant("", calls: [call])]
        var options = AnswerOptions.greedy
        options.maxTokens = 2
        let results = [ToolResult(of: "call_1", text: "noon")]
        _ = try await text(of: chat.answer(with: results, options: options))
        #expect(chat.messages.count == 4)
        #expect(chat.messages[2] == .result("noon", of: "call_1"))
        await #expect(throws: ApertusError.self) {
            _ = try await text(of: chat.answer(with: [ToolResult(of: "other", text: "x")]))
        }
        #expect(chat.messages.count == 4)
    }

    @Test func aPromptThatDoesNotFitIsRefused() async throws {
        var options = LoadOptions()
        options.context = 24
        let apertus = try await Apertus(folder: KitFixtures.model, options: options)
        let chat = apertus.conversation()
        await #expect {
            _ = try await text(of: chat.ask("one two three four five six seven eight nine ten"))
        } throws: { ($0 as? ApertusError)?.kind == .usage }
        #expect(chat.messages.isEmpty)
    }

    @Test func shortMemoryEndsAnswersWithAnError() async throws {
        let apertus = try await KitFixtures.load()
        var options = AnswerOptions.greedy
        options.maxTokens = 1000
        let pieces = apertus.continuation(of: "The capital of France is", options: options)
        var iterator = pieces.makeAsyncIterator()
        _ = try await iterator.next()
        await apertus.memoryRunsShort()
        await #expect {
            while try await iterator.next() != nil {}
        } throws: { ($0 as? ApertusError)?.kind == .resource }
    }
}

private final class Threads: @unchecked Sendable {
    private let lock = NSLock()
    private var seen: Set<ObjectIdentifier> = []
    var count: Int { lock.withLock { seen.count } }
    func note() { lock.withLock { _ = seen.insert(ObjectIdentifier(Thread.current)) } }
}

private final class Order: @unchecked Sendable {
    private let lock = NSLock()
    private var found: [Int] = []
    var numbers: [Int] { lock.withLock { found } }
    func add(_ number: Int) { lock.withLock { found.append(number) } }
}
