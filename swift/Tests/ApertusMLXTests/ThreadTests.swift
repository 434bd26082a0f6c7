import ApertusCore
import Foundation
import MLX
import Testing

@testable import ApertusMLX

private actor Engine {
    nonisolated var unownedExecutor: UnownedSerialExecutor {
        ThreadExecutor.shared.asUnownedSerialExecutor()
    }
    private let prefix: CachedPrefix

    init(_ folder: URL) async throws {
        prefix = try CachedPrefix(model: try ApertusModel(folder: folder))
    }
    func ask(_ prompt: [Int]) throws -> (tokens: [Int], thread: Int) {
        (try drain(try prefix.begin(prompt, maxTokens: 3)), pthread_self().hashValue)
    }
}

@Suite struct ThreadTests {
    @Test func manyTasksOneThread() async throws {
        let engine = try await Engine(ModelFixture(name: "affine-4-64").folder)
        let expected = try await engine.ask([5, 6, 7])
        try await withThrowingTaskGroup(of: ([Int], Int).self) { group in
            for _ in 0 ..< 200 {
                group.addTask {
                    try await Task.detached { try await engine.ask([5, 6, 7]) }.value
                }
            }
            for try await (tokens, thread) in group {
                #expect(tokens == expected.tokens)
                #expect(thread == expected.thread)
            }
        }
    }

    @Test func errorsOfMLXAreThrown() {
        #expect(throws: MLXError.self) {
            try withError {
                _ = matmul(MLXArray([1, 2] as [Float], [1, 2]), MLXArray([1, 2] as [Float], [1, 2]))
            }
        }
        let error = #expect(throws: ApertusError.self) {
            try catchingMLX("testing") {
                eval(MLXArray([1, 2] as [Float]).reshaped([3]))
            }
        }
        #expect(error?.kind == .bug && error?.description.hasPrefix("testing: ") == true)
    }
}
